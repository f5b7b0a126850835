"""A model of ours as the judge of HELM's annotators, in place of the API models that they name.

Imports HELM, of the engine its errors, and nothing else of flexgen_helm.
"""
