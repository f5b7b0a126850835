"""Experts of a mixture, computed for all tokens of a micro-batch at once.

It imports kernels.
"""
