"""Parameters of a model as views of memory, and how they are put into its modules."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from engine.memory.layout import Extent
from engine.weights.placed_unit import PlacedUnit

Binding = tuple[nn.Module, str, nn.Parameter]
"""(module, attribute name, parameter view)."""


def parameter_of(view: torch.Tensor) -> nn.Parameter:
    """A parameter whose storage is that of `view`."""
    return nn.Parameter(view, requires_grad=False)


def bind(bindings: list[Binding]) -> None:
    """Put parameters into their modules."""
    for module, attribute, parameter in bindings:
        module._parameters[attribute] = parameter


def stored_bytes(placed: PlacedUnit, extent: Extent, slot: torch.Tensor) -> torch.Tensor:
    """A parameter's stored bytes on the device: where they are resident, or in the slot that the unit is in."""
    if extent.end <= placed.start:
        return placed.parts["device"][extent.first : extent.end]
    return slot[extent.first - placed.start : extent.end - placed.start]


def binding(state: Mapping[str, torch.Tensor], placed: PlacedUnit, extent: Extent, memory: torch.Tensor) -> Binding:
    """A parameter as a view of its bytes; `state` tells its dtype and shape."""
    like = state[extent.name]
    return (*placed.unit.owners[extent.name], parameter_of(memory.view(like.dtype).view(like.shape)))


def bindings(state: Mapping[str, torch.Tensor], placed: PlacedUnit, slot: torch.Tensor) -> list[Binding]:
    """All parameters of a unit."""
    return [binding(state, placed, extent, stored_bytes(placed, extent, slot)) for extent in placed.extents]
