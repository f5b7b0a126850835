"""Processes in addition to the one that HELM runs in: engines and helpers.

It imports `terminal` and `planning`, and no HELM.
"""
