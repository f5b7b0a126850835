"""Data wrangling (Narayan et al. 2022, "Can Foundation Models Wrangle Your Data?") as a scenario of HELM's.

Imports HELM and the engine's errors, and no other folder of flexgen_helm.
"""
