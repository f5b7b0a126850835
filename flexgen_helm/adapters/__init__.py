"""Models for other evaluation harnesses; each is known to its harness once it is imported.

Imports the engine and that harness, and no other folder of flexgen_helm.
"""
