"""What every engine offers those who ask it: `run`, `stream`, `astream`, and `generate` as transformers has it.

Imports no other room.
"""
