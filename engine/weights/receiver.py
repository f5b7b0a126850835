"""What takes a checkpoint's tensors in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from engine.model.causal_model import CausalModel


class Receiver(Protocol):
    """What takes a checkpoint's tensors in: the store, or who looks at them beside it."""

    @property
    def model(self) -> CausalModel:
        """Whose parameters they are."""

    def adopt(self, name: str, dtype: torch.dtype, path: Path, first: int) -> int:
        """How many elements of a parameter, which a file holds from byte `first` on, are to be `put`."""

    def put(self, name: str, tensor: torch.Tensor, first_element: int = 0) -> None:
        """Take a parameter, or consecutive elements of it."""

    def put_packed(self, name: str, source: str, tensor: torch.Tensor) -> None:
        """Take a part of a packed parameter, as the checkpoint has it."""

    def put_buffer(self, name: str, tensor: torch.Tensor) -> None:
        """Take a persistent buffer."""

    def arrive(self, name: str) -> None:
        """Be told that all of a parameter was put."""


@dataclass(frozen=True)
class Nowhere:
    """No places, for a plan that nobody carries out."""

    model: CausalModel

    def adopt(self, *_: Any) -> int:
        """Nothing."""
        return 0

    def put(self, *_: Any) -> None:
        """Never called."""
        raise AssertionError("the plan is only checked")

    def put_buffer(self, *_: Any) -> None:
        """Nothing: the model is not to be filled."""

    put_packed = arrive = put
