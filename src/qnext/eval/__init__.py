"""Evaluation: what a small model can do, in numbers that repeat.

Everything is greedy or a likelihood. Measurements go through ``LLM``, as a user's requests do.
"""
