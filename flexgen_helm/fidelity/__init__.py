"""Compares a run with plain transformers: the reference, the comparison, and the verdict.

It imports the engine, and `terminal`, `planning`, `workers`, `helm`, `judging` and `runs` of flexgen_helm.
"""
