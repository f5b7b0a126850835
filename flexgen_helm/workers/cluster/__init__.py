"""Engines on the machines of a Ray cluster. Only functions import Ray here, when a command asks for it.

Commands use `ray_cluster`; `actor` runs on the machines.
"""
