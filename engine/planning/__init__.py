"""What a run will take: the machine, limits, and the plan that fits a policy to a model and to the memory at hand.

It imports memory and kernels, and neither torch nor transformers.
"""
