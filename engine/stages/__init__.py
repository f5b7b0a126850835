"""A model's layers in stages of several processes (pipeline parallelism): messages, and the stages that do not lead."""
