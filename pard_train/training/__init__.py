"""The trainer, its log, and its checkpoints.

In the order of imports: throughput, background, page, trackers, arguments, signals, processes, callbacks, watchdog,
inputs, plan, trainer, checkpoints.
"""
