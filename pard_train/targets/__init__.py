"""Target models that write text: conversations, their cached answers, servers, regenerated data, scores.

In the order of imports: target, answers, conversation, servers, writing, compatibility, cases, regeneration, scoring.
"""
