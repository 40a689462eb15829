"""Acceptance from texts and a draft: counting, replay, and what it predicts under load.

In the order of imports: counting, load, chain_attention, chains, replay.
"""
