"""Compares what sweeps compute with stock layers of transformers, layer by layer, in one pass over the weights.

It imports every room before it: memory, kernels, planning, schedule, batch, checkpoint, cache, model and weights.
"""
