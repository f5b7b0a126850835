"""Compares a run with plain transformers: the reference, the comparison, and the verdict.

It imports the engine, and of flexgen_helm terminal and helm.
"""
