"""Parts of a model's layers that one kernel computes in place of many functions, known by what they compute.

It imports kernels.
"""
