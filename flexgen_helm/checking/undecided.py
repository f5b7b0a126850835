"""The errors of what can be said neither to be equal nor to differ."""

from __future__ import annotations


class UndecidedError(Exception):
    """A model's small copy allows no verdict; the message is one line."""


class UnpackableError(UndecidedError):
    """A small copy cannot be packed as the model is, or plain transformers cannot compute it so."""
