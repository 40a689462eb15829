"""The matrix of drafts, targets and benchmarks: replay, live speed, engines, one report; the monitor of training.

In the order of imports: speed, matrix, measurement, samples, engine_records, evaluate, monitor.
"""
