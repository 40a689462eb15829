"""Target models that write text: their answers and servers, what draft and target must share, regenerated data, scores.

In the order of imports: answers, servers, compatibility, cases, scored_cases, regeneration, scoring.
"""
