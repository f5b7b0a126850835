"""Parameters of a model as views of memory, and their assignment to its modules."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from engine.memory.layout import Extent
from engine.weights.placed_unit import PlacedUnit
from engine.weights.portion import Portion

Binding = tuple[nn.Module, str, nn.Parameter]
"""(module, attribute name, parameter view)."""


def parameter_of(view: torch.Tensor) -> nn.Parameter:
    """A parameter with the storage of `view`."""
    return nn.Parameter(view, requires_grad=False)


def bind(bindings: list[Binding]) -> None:
    """Assign parameters to their modules."""
    for module, attribute, parameter in bindings:
        module._parameters[attribute] = parameter


def stored_bytes(portion: Portion, slot: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """A unit's stored bytes `first` to `end` on the device: resident ones, or those of the portion in a slot."""
    if end <= portion.placed.start:
        return portion.placed.parts["device"][first:end]
    return portion.of(slot, first, end)


def binding(state: Mapping[str, torch.Tensor], placed: PlacedUnit, extent: Extent, memory: torch.Tensor) -> Binding:
    """A parameter as a view of its bytes; `state` has its dtype and shape."""
    like = state[extent.name]
    return (*placed.unit.owners[extent.name], parameter_of(memory.view(like.dtype).view(like.shape)))


def bindings(state: Mapping[str, torch.Tensor], portion: Portion, slot: torch.Tensor) -> list[Binding]:
    """All parameters of a unit whose streamed part passes through a slot at once."""
    placed = portion.placed
    return [binding(state, placed, each, stored_bytes(portion, slot, each.first, each.end)) for each in placed.extents]
