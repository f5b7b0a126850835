"""Which device computes which jobs, and which of its sweeps in flight a sequence is in (pure).

Nothing here starts a process or talks to one: `engine.workers` and `engine.hosts` act on what it says.
"""
