"""Parameters of a model as views of memory, and how they are put into its modules."""

from __future__ import annotations

import torch
from torch import nn

Binding = tuple[nn.Module, str, nn.Parameter]
"""(module, attribute name, parameter view)."""


def parameter_of(view: torch.Tensor) -> nn.Parameter:
    """A parameter whose storage is that of `view`."""
    return nn.Parameter(view, requires_grad=False)


def bind(bindings: list[Binding]) -> None:
    """Put parameters into their modules."""
    for module, attribute, parameter in bindings:
        module._parameters[attribute] = parameter
