"""What `flexgen-helm complete` reads and writes: prompts in, answers out.

Imports neither HELM nor torch.
"""
