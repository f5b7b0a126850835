"""Packed checkpoints without a model's numbers: which tensors of which format a config tells of, and random codes.

It imports no HELM.
"""
