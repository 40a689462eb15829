"""Draft folders that engines load: the card, the export, the proof that an engine accepts what replay says.

In the order of imports: card, export, verification.
"""
