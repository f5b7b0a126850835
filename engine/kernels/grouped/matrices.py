"""What the experts of one layer consist of, whatever family it is of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.kernels.grouped.gating import Gating
from engine.kernels.grouped.stack import Stack


@dataclass(frozen=True)
class Matrices:
    """The matrices of all experts of a layer: two products, and what is done with the numbers between them."""

    first: Stack
    """`[experts, hidden size, between]`."""
    second: Stack
    """`[experts, inner size, hidden size]`."""
    first_bias: torch.Tensor | None
    """`[experts, between]`."""
    second_bias: torch.Tensor | None
    """`[experts, hidden size]`."""
    activation: Callable[[torch.Tensor], torch.Tensor]
    """Rows of the first product `[rows, between]` -> rows for the second `[rows, inner size]`, each by itself."""
    gating: Gating | None
    """What `activation` is, if that is known."""

    @property
    def count(self) -> int:
        """How many experts there are."""
        return self.first.shape[0]
