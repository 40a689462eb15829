"""The trainer, its log, and its checkpoints.

In the order of imports: throughput, background, trackers, arguments, signals, callbacks, trainer, checkpoints.
"""
