"""HELM's requests: rendered, tokenized, and translated to jobs of the engine, and results made from the answers.

It imports the engine and HELM's request types, and no other folder of flexgen_helm.
"""
