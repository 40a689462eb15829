"""Faster float32 on CPUs: matrix products through oneDNN, and attention in blocks of slots.

In the order of imports: products, block_attention.
"""
