"""A unit: parameters of a model that are placed, and brought to the device, as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
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

    @contextmanager
    def holding(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside, the modules have parameters of these values, by full name; what they had before, they have again."""
        before = {name: module._parameters[attribute] for name, (module, attribute) in self.owners.items()}
        try:
            for name, (module, attribute) in self.owners.items():
                module._parameters[attribute] = nn.Parameter(values[name], requires_grad=False)
            yield
        finally:
            for name, (module, attribute) in self.owners.items():
                module._parameters[attribute] = before[name]
