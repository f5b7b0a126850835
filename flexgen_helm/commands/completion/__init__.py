"""What `flexgen-helm complete` reads and writes: prompts in, answers out.

Imports the engine's ground and `terminal`, neither HELM nor torch.
"""
