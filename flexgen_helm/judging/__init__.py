"""A model of ours as the judge of HELM's annotators, in place of the API models that they name.

It imports HELM and the engine's errors, and nothing else of flexgen_helm.
"""
