"""Weights: placed on the tiers, loaded from a checkpoint, streamed to the device, stored encoded on disk.

It imports memory, kernels, planning, checkpoint and model.
"""
