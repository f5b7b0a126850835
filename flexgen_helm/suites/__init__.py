"""Suites that have run: reading a suite's directory, and what changed from one suite to another beyond noise.

Imports the engine's errors, and of flexgen_helm helm's scores and sweeps' record.
"""
