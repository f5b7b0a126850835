"""The memory that a draft model takes of what a policy is fitted to.

Like its parent package, it imports no torch.
"""
