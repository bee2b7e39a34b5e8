"""Questions, stories and dialogues made by rule, each a pure function of a seeded generator.

A tenth of all operands, names and values, chosen by hash, is never generated for training; the
evaluation uses exactly those.
"""
