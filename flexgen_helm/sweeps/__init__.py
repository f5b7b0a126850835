"""A suite as one job: the requests of its runs are answered together, and a record, log and progress are kept.

It imports the engine, HELM, and `terminal`, `planning`, `workers`, `helm` and `judging` of flexgen_helm.
"""
