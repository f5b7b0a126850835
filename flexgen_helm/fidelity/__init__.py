"""How near a run is to plain transformers: the reference, the comparison with it, and the verdict.

Imports the engine, and of flexgen_helm terminal and helm.
"""
