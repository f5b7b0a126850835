"""The weights of the experts of one layer, for all model families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.kernels.grouped.gating import Gating
from engine.kernels.grouped.stack import Stack


@dataclass(frozen=True)
class Matrices:
    """The matrices of all experts of a layer: two products, and the activation between them."""

    first: Stack
    """The first product's matrices, `[experts, hidden size, between]`."""
    second: Stack
    """The second product's matrices, `[experts, inner size, hidden size]`."""
    first_bias: torch.Tensor | None
    """The first product's biases, `[experts, between]`."""
    second_bias: torch.Tensor | None
    """The second product's biases, `[experts, hidden size]`."""
    activation: Callable[[torch.Tensor], torch.Tensor]
    """A row-wise function from the first product's rows `[rows, between]` to the second's input `[rows, inner
    size]`."""
    gating: Gating | None
    """The gate that `activation` computes, if it is a known one."""

    @property
    def count(self) -> int:
        """The number of experts."""
        return self.first.shape[0]
