"""The training step on the device: attention over chains, and the chunked loss of slots through the head.

In the order of imports: cpu, attention, terms, head, objectives.
"""
