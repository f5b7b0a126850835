"""The interface to HELM: client, runner and cache, and the translation of requests into jobs of the engine.

It imports the engine, HELM, and `terminal`, `planning` and `workers` of flexgen_helm.
"""
