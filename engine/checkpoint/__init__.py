"""A model directory: where it is, which files are its weights, what its tensors are called, and what identifies it.

It imports memory, kernels and planning.
"""
