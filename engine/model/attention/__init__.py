"""The attention function that the layers of a model call: one interface and its implementations.

It imports what its room imports.
"""
