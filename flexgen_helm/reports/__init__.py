"""The page that shows a suite: scores, changes, speed, and how near they are to a reference.

Imports errors of the engine, and of flexgen_helm suites, sweeps, fidelity and helm.
"""
