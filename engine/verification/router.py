"""Finds the layers that choose experts for each row."""

from __future__ import annotations

from torch import nn

_PARTS = frozenset({"experts", "router", "router_gate"})
"""The names that families of transformers give to the parts of a mixture, in any of its layers' modules."""


def has_router(layer: nn.Module) -> bool:
    """Whether a decoder layer of transformers sends each row to some of its experts; a dense one does not."""
    return any(name.rpartition(".")[2] in _PARTS for name, _ in layer.named_modules())
