"""A unit: parameters of a model that are placed, and copied to the device, together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

Owner = tuple[nn.Module, str]
"""A parameter's module and its name in it."""


@dataclass(frozen=True)
class Unit:
    """Parameters that are placed, and copied to the device, together."""

    name: str
    """The unit's name: "embedding", "outer", "layer.N" or "head"."""
    owners: dict[str, Owner]
    """The owners by full parameter name."""

    @contextmanager
    def holding(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside, the modules' parameters have these values, by full name; afterwards the earlier ones again."""
        before = {name: module._parameters[attribute] for name, (module, attribute) in self.owners.items()}
        try:
            for name, (module, attribute) in self.owners.items():
                module._parameters[attribute] = nn.Parameter(values[name], requires_grad=False)
            yield
        finally:
            for name, (module, attribute) in self.owners.items():
                module._parameters[attribute] = before[name]
