"""What a training step computes on the device: attention over chains, and the loss of slots through the head.

In the order of imports: cpu, attention, terms, head, objectives.
"""
