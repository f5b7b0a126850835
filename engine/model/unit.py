"""A unit: parameters of a model that are placed, and brought to the device, as one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

Owner = tuple[nn.Module, str]
"""A parameter's module and its name there."""


@dataclass(frozen=True)
class Unit:
    """Parameters that are placed, and brought to the device, as one."""

    name: str
    """"embedding", "outer", "layer.N" or "head"."""
    owners: dict[str, Owner]
    """By full parameter name."""
