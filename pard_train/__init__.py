"""pard_train: train parallel draft models (PARD, arXiv 2504.18583) and measure what they accept.

Modules are nouns. Data walks one way, and so do imports, between packages and within each; in one way: errors,
commands, config, families, layout, architectures, validation, runs, device, bootstrap, stand_in, downloads, core,
kept_layers, mask_token, transplant, vocabulary, model, fingerprints, data, reports, training, generation, acceptance,
engines, targets, evaluation, publishing, overrides, program.
"""

__version__ = "0.2.0"
