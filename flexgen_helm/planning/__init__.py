"""Estimates: the time of a workload under a policy, the best policy for it, and the model shapes and records needed.

It imports terminal and the engine. Nothing in it imports HELM, and torch only where a model is built.
"""
