"""Batch-invariant arithmetic: the bits of a row's result do not depend on the other rows of the batch.

It imports memory.
"""
