"""Decides which device computes which jobs, and in which concurrent sweep a sequence is computed (pure).

Nothing here starts a process or sends a message: `engine.workers` and `engine.hosts` act on its decisions.
"""
