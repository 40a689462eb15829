"""Runnable Hydra programs, each a table of contents of what it does."""
