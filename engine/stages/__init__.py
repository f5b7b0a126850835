"""A model's layers in stages of several processes: what they tell each other, and what all but the last one do.

Imports memory, kernels, planning, schedule, checkpoint, cache, model and weights.
"""
