"""What a model directory holds: which files are the model, the names of its tensors, packed parts, its identity.

It imports memory, kernels and planning.
"""
