"""Decode steps recorded once per shape and replayed in one call (CUDA graphs).

It imports batches, the cache and the model's parts.
"""
