"""The training step on the device: attention over chains, and the chunked loss of slots through the head.

In the order of imports: cpu, scores, block_mask, attention, terms, head, objectives.
"""
