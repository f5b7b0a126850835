"""HELM's requests on their way: rendered, tokenized, made into jobs of the engine, and the results made of answers.

Imports the engine and HELM's request types, and no other folder of flexgen_helm.
"""
