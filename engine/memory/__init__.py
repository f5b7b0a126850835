"""Bytes on three tiers: the accelerator, page-locked host memory, files of the disk tier.

It knows tensors as bytes and rows, and nothing of models. It imports only the ground: errors, job, policy.
"""
