"""A stock transformers model taken apart: built without weights, probed, and driven layer by layer.

It imports memory, kernels, schedule, batch, checkpoint and cache.
"""
