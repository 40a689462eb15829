"""Target models: conversations, cached answers, servers, regenerated data, and scores.

In the order of imports: target, answers, conversation, servers, writing, compatibility, serving, cases, regeneration,
scoring.
"""
