"""The trainer, what its log tells, its checkpoints, and the dense step that it is measured against.

In the order of imports: reference, throughput, clock, trackers, arguments, callbacks, trainer, checkpoints.
"""
