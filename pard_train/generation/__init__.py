"""Live decoding with any proposer of drafts, and in a terminal.

In the order of imports: sampling, runner, proposers, decoding, terminal.
"""
