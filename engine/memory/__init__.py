"""Memory on three tiers: the accelerator, page-locked host memory, and files of the disk tier.

It handles tensors as bytes and rows, without models. It imports only the ground: errors, job, policy.
"""
