"""The part of a model's interface that probing a family needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from engine.model.indexers.indexer import Indexer
from engine.model.mixers.mixer import Mixer
from engine.model.outer_forward import OuterForward
from engine.model.stub import CallRecorder, LayerCall
from engine.model.sweep_context import SweepContext
from engine.model.unit import Unit


class Drivable(Protocol):
    """A model whose layers are called one by one (`CausalModel`)."""

    module: Any
    config: Any
    dtype: torch.dtype
    sweeping: SweepContext
    recorder: CallRecorder
    layers: list[nn.Module]
    units: list[Unit]
    state: dict[str, torch.Tensor]
    is_padded: bool
    outer: OuterForward
    mixers: dict[int, Mixer]
    indexers: dict[int, Indexer]

    @property
    def embedding_name(self) -> str:
        """The full name of the token embedding's weight."""

    def record(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, list[LayerCall]]:
        """Embed a micro-batch, and record how each layer is called."""

    def embedding_as(self, look_up: Callable[[torch.Tensor], torch.Tensor]) -> AbstractContextManager[None]:
        """Inside, the token embedding returns what `look_up` makes of ids."""
