"""Exact acceptance by replay, estimates where replay cannot be exact, live speed, and the matrix of drafts, targets and
benchmarks; the monitor runs it inside of training.

In the order of imports: acceptance, chain_memory, chains, replay, estimate, fingerprints, target_text, servers,
benchmarks, compatibility, cases, scored_cases, speed, matrix, measurement, samples, engine_records, evaluation,
monitor.
"""
