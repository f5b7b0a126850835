"""Planning: what a workload takes under a policy, which policy takes least, and the shapes and records that needs.

The room imports terminal and the engine. Nothing in it imports HELM, and torch only where a model is built.
"""
