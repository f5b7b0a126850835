"""Processes beside the one that HELM runs in: those of engines.

Imports `terminal` and `planning`, and no HELM.
"""
