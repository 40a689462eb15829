"""pard_train: train parallel draft models (PARD, arXiv 2504.18583) and measure what they accept.

Modules are nouns. Data walks one way, and so do imports; in one way: errors, config, layout, validation, run,
attention, objective, rows, schemas, dedupe, chat, packages, store, packing, model, inspection, trackers, trainer,
checkpoints, card, export, sampling, proposers, decoding, acceptance, replay, estimate, target_text, servers, scores,
benchmarks, compatibility, speed, report, webpage, evaluation, monitor, candidates, vllm_engine, verification, terminal.
"""

__version__ = "0.1.0"
