"""Weights that several engines of one machine share: in host memory that all of them read, or with a part in each.

It imports what `weights` may import.
"""
