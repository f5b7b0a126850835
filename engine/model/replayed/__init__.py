"""Decode steps as recordings of what the device is asked: made once a shape, then replayed in one call.

It imports batches, the cache and the model's parts.
"""
