"""A model's layers in stages of several processes (pipeline parallelism): messages, and the stages that do not lead.

It imports `memory`, `kernels`, `planning`, `schedule`, `checkpoint`, `cache`, `model` and `weights`.
"""
