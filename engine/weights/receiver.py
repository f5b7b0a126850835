"""The interface of a receiver of a checkpoint's tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from engine.model.causal_model import CausalModel


class Receiver(Protocol):
    """Receives a checkpoint's tensors: the store, or a reader that compares them with it."""

    @property
    def model(self) -> CausalModel:
        """The model that the parameters belong to."""

    def adopt(self, name: str, dtype: torch.dtype, path: Path, first: int) -> int:
        """The number of elements that must be `put`, of a parameter that a file holds from byte `first` on."""

    def put(self, name: str, tensor: torch.Tensor, first_element: int = 0) -> None:
        """Receive a parameter, or consecutive elements of it."""

    def put_packed(self, name: str, source: str, tensor: torch.Tensor) -> None:
        """Receive a part of a packed parameter, as stored in the checkpoint."""

    def put_buffer(self, name: str, tensor: torch.Tensor) -> None:
        """Receive a persistent buffer."""

    def arrive(self, name: str) -> None:
        """Note that all of a parameter was put."""


@dataclass(frozen=True)
class Nowhere:
    """A receiver without memory, for a plan that is not executed."""

    model: CausalModel

    def adopt(self, *_: Any) -> int:
        """No elements."""
        return 0

    def put(self, *_: Any) -> None:
        """Never called."""
        raise AssertionError("the plan is only checked")

    def put_buffer(self, *_: Any) -> None:
        """Do nothing: the model is not to be filled."""

    put_packed = arrive = put
