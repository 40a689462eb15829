"""Evaluation: acceptance, live speed and engine counters of drafts x targets x benchmarks; the monitor of training.

In the order of imports: speed, matrix, measurement, live, engine_records, load, evaluate, study, monitor.
"""
