"""Acceptance from texts and a draft: counting, exact replay of greedy text, and estimates above temperature 0.

In the order of imports: counting, load, chain_attention, chains, replay, estimate.
"""
