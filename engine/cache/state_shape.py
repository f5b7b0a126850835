"""The size of the recurrent state that a layer keeps of a sequence; it does not depend on the sequence's length."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a layer's state."""

    name: str
    """The name under which the layer asks its cache for the tensor, such as "conv 0"."""
    dims: tuple[int, ...]
    """The dimensions for one sequence."""
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """The number of bytes for one sequence."""
        return prod(self.dims) * self.dtype.itemsize


@dataclass(frozen=True)
class StateShape:
    """The state of one sequence in one layer."""

    tensors: tuple[StateTensor, ...]

    @property
    def num_bytes(self) -> int:
        """The number of bytes for one sequence."""
        return sum(tensor.num_bytes for tensor in self.tensors)
