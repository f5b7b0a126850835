"""What layers keep of sequences from one sweep to the next, whatever kind of layer it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from engine.batch.rows import Rows
from engine.schedule.cache_room import CacheRoom
from engine.schedule.sequence import Prefix, Span


class LayerMemory(Protocol):
    """What the layers of a sweep write and read, and the room that spans have for it."""

    room: CacheRoom
    """Where spans get room, and give it back."""

    def stage_ahead(self, batches: Sequence[Rows], layers: Iterable[int] | None = None) -> None:
        """Begin a sweep over micro-batches: what it will read on other tiers is brought to the device ahead of it.

        From now on the sweep may read what the sweep before wrote. `layers`: those it passes, in order; None: all.
        """

    def write(self, layer: int, batch: Rows, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keep what a layer made of a micro-batch's rows; returns it as it will be read later."""

    def fork(self, layer: int, chain: tuple[Prefix, ...]) -> Any:
        """What spans that continue a chain of prefixes start from in a layer, on the device.

        Keys and values are read where the prefixes have them; a state that its reader changes is a copy.
        """

    def read(self, layer: int, span: Span, num_rows: int) -> torch.Tensor:
        """What a layer keeps of the first `num_rows` tokens of a span, on the device."""

    def close(self) -> None:
        """Let go of all memory; the arena frees it."""
