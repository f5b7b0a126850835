"""What a layer keeps of a sequence whatever its length: a state."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a layer's state."""

    name: str
    """What it is to the cache that the layer asks for it, such as "conv 0"."""
    dims: tuple[int, ...]
    """Of one sequence."""
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of one sequence."""
        return prod(self.dims) * self.dtype.itemsize


@dataclass(frozen=True)
class StateShape:
    """The state of one sequence in one layer."""

    tensors: tuple[StateTensor, ...]

    @property
    def num_bytes(self) -> int:
        """Of one sequence."""
        return sum(tensor.num_bytes for tensor in self.tensors)
