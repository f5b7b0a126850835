"""What layers keep of sequences between sweeps (keys and values), and hidden states between layers.

It imports memory, kernels, planning, schedule and batch.
"""
