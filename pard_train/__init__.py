"""pard_train: train parallel draft models (PARD, arXiv 2504.18583) and measure what they accept.

Modules are nouns. Data walks one way, and so do imports; in one way: errors, config, layout, validation, attention,
objective, chat, corpus, packing, packages, model, run, trackers, trainer, export, decoding, acceptance, replay,
target_text, benchmarks, report, evaluation, terminal.
"""

__version__ = "0.1.0"
