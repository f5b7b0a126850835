"""Sequences and the prefixes that they share, and which of their rows ride in the next sweep.

It imports memory and planning, and neither torch nor transformers.
"""
