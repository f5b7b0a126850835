"""The terminal: how commands read flags, end early, show progress and lay out tables.

The room knows nothing of runs or models. It imports the engine's errors and no other room, neither HELM nor torch.
"""
