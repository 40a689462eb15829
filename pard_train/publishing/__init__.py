"""Export of draft folders that engines load, their model cards, and the verification of engines against replay.

In the order of imports: origin, card, export, differences, verification.
"""
