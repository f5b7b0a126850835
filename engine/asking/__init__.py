"""The interface of every engine: `run`, `stream`, `astream`, and `generate` with the arguments of transformers.

This package imports no other room.
"""
