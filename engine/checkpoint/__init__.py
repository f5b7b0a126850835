"""A model directory: how it is found, which files hold its weights, how tensors are named, and what identifies it.

It imports memory, kernels and planning.
"""
