"""pard_train: train parallel draft models (PARD, arXiv 2504.18583) and measure what they accept.

Modules are nouns. Data walks one way, and so do imports; in one way: errors, config, layout, validation, run,
attention, objective, rows, schemas, dedupe, chat, packages, store, packing, model, inspection, trackers, trainer,
export, decoding, acceptance, replay, target_text, servers, scores, benchmarks, report, evaluation, terminal.
"""

__version__ = "0.1.0"
