"""From chats to packs: rows of any file or data set, their schema, text and tokens, labels, scores, bins; and what
a person looks at before training.

In the order of imports: rows, schemas, sources, benchmarks, dedupe, thoughts, chat, encoding, store, scores, packing,
inspection, pattern, examples, prompts.
"""
