"""The interface of all that layers keep of sequences from one sweep to the next (keys and values, or states)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from engine.batch.rows import Rows
from engine.schedule.cache_room import CacheRoom
from engine.schedule.sequence import Prefix, Span


class LayerMemory(Protocol):
    """What the layers of a sweep read and write, and the allocator of its space."""

    room: CacheRoom
    """Allocates and frees space for spans."""

    def stage_ahead(self, batches: Sequence[Rows], layers: Iterable[int] | None = None) -> None:
        """Begin a sweep over micro-batches: start to bring the data it will read from other tiers to the device.

        From now on the sweep may read what the sweep before wrote. `layers`: those it passes, in order; None: all.
        """

    def write(self, layer: int, batch: Rows, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Store the output of a layer for a micro-batch's rows; returns it exactly as later steps will read it."""

    def fork(self, layer: int, chain: tuple[Prefix, ...]) -> Any:
        """The data from which spans that continue a chain of prefixes start in a layer, on the device.

        Keys and values are read in place; a state, which its reader changes, is copied.
        """

    def read(self, layer: int, span: Span, num_rows: int) -> torch.Tensor:
        """What a layer keeps of the first `num_rows` tokens of a span, on the device."""

    def close(self) -> None:
        """Release all memory; the arena frees it."""
