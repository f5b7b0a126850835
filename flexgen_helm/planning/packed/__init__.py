"""Packed checkpoints without weights: the tensors and formats that a config describes, and random codes.

It imports no HELM.
"""
