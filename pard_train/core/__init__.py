"""What a training step computes on the device: attention over chains, and the loss of slots through the head.

In the order of imports: products, block_attention, attention, terms, slot_head, objective.
"""
