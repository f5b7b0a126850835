"""Engines on the machines of a Ray cluster. Ray is imported only by functions here, when a command asks for it.

`ray_cluster` is what commands use; `actor` is what runs on the machines.
"""
