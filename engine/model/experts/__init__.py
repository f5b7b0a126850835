"""Mixture of experts, computed for all tokens of a micro-batch at once.

It imports kernels.
"""
