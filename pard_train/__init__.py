"""pard_train: train parallel draft models (PARD, arXiv 2504.18583) and measure what they accept.

Modules are nouns. Data walks one way, and so do imports; in one way: errors, config, layout, validation, run, products,
attention, terms, slot_head, objective, rows, schemas, dedupe, chat, packages, encoding, store, scores, packing,
reference, throughput, clock, model, inspection, pattern, records, tables, charts, sections, webpage, report,
comparison, trackers, trainer, checkpoints, card, export,
sampling, runner, proposers, decoding, acceptance, chain_memory, chains, replay, estimate, target_text, servers,
benchmarks, compatibility, cases, scored_cases, speed, matrix, measurement, vllm_engine,
engine_records, evaluation, monitor,
candidates, tensorrt_llm, transformers_engine, verification, terminal.
"""

__version__ = "0.1.0"
