"""What a draft model takes of the memory that a policy is fitted to.

As its room, it imports no torch.
"""
