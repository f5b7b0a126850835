"""HELM's seam: the client, runner and cache that HELM asks, and what translates its requests into jobs of the engine.

Imports the engine, HELM, and of flexgen_helm terminal and planning.
"""
