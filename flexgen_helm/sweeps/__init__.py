"""A suite as one job: its runs' requests answered together, and the record, log and progress that are kept of it.

Imports the engine, HELM, and of flexgen_helm terminal, planning and helm.
"""
