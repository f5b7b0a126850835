"""Comparing what sweeps compute with stock layers of transformers, layer by layer, while the weights pass once.

It imports every room before it: memory, kernels, planning, schedule, batch, checkpoint, cache, model and weights.
"""
