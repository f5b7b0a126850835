"""Models for other evaluation harnesses, which importing them registers with their harness, and OpenAI's API.

It imports the engine, the respective harness, `planning` and `workers` of flexgen_helm, and the parts of `helm` that
know how models think and how tokens are spelled.
"""
