"""Weights that several engines of one machine share: in host memory that all of them read, or a part each.

It imports what `weights` may import.
"""
