"""The error of families that cannot be driven layer by layer."""

from __future__ import annotations

from engine.errors import UnsupportedError


class UndrivableError(UnsupportedError):
    """A family computes what no way of driving its layers reproduces; there is nothing else to try."""
