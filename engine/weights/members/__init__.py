"""Weights that several engines of one machine share: in host memory that all of them read, or a part of them each.

Imports what `weights` may import.
"""
