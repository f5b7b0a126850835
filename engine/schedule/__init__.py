"""Sequences, the prefixes that they share, and the choice of the rows that the next sweep computes.

It imports memory and planning, and neither torch nor transformers.
"""
