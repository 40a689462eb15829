"""pard_train: train parallel draft models (PARD, arXiv 2504.18583) and measure what they accept.

Modules are nouns and import one way: errors, config -> layout -> attention, objective -> chat, corpus -> packing
-> model -> run -> trainer -> export -> decoding, acceptance -> replay -> benchmarks -> evaluation -> report.
"""

__version__ = "0.1.0"
