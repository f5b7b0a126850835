"""Estimates of memory and limits, and the plan that fits a policy to a model and the available memory.

It imports memory and kernels, and neither torch nor transformers.
"""
