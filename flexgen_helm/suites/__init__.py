"""Finished suites: reads a suite's directory, and finds what changed from one suite to another beyond noise.

It imports the engine's errors, and `planning`, `helm` and `sweeps` of flexgen_helm.
"""
