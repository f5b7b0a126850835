"""What the experts of one layer consist of, whatever family it is of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Matrices:
    """The matrices of all experts of a layer: two products, and what is done with the numbers between them."""

    first: torch.Tensor
    """`[experts, hidden size, between]`, with any strides."""
    second: torch.Tensor
    """`[experts, inner size, hidden size]`, with any strides."""
    first_bias: torch.Tensor | None
    """`[experts, between]`."""
    second_bias: torch.Tensor | None
    """`[experts, hidden size]`."""
    activation: Callable[[torch.Tensor], torch.Tensor]
    """Rows of the first product `[rows, between]` -> rows for the second `[rows, inner size]`, each by itself."""
    is_swiglu: bool
    """Whether `activation` is silu(a) * b of the two halves `[a | b]` of a row, which are `inner size` wide each."""

    @property
    def count(self) -> int:
        """How many experts there are."""
        return self.first.shape[0]
