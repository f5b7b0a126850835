"""Tables of rows, one per layer and tier, that grow on demand; each sequence has its rows on one tier."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch

from engine.cache.shape import KVShape
from engine.errors import CapacityError, one_line
from engine.kernels.codec import Codec
from engine.memory.arena import Arena
from engine.memory.disk.rows import DiskRows
from engine.memory.free_rows import FreeRows
from engine.memory.tiers import TIERS, Tier, percents
from engine.policy import Share
from engine.schedule.block import Block

_GROWTH = 1.5
_ALLOCATING_THREADS = 8


class Tables:
    """Rows of keys and values of all layers on the three tiers, up to a budget of bytes a tier.

    Sequences go to the tiers by `share` (counted in sequences), or, without one, to the device while it has room, then
    to the host, then to disk.
    """

    def __init__(
        self,
        shapes: list[KVShape],
        dtype: torch.dtype,
        arena: Arena,
        budgets: dict[Tier, int],
        share: Share | None,
        codec: Codec | None,
        disk: DiskRows,
        settle: Callable[[], None],
    ) -> None:
        """`settle` returns when no copy to a table is under way any more."""
        self._shapes, self._dtype, self._codec = shapes, dtype, codec
        self.row_bytes = cache_row_bytes(shapes, dtype, codec)
        """Bytes of one token over all layers, by tier."""
        self._arena, self._disk, self._settle = arena, disk, settle
        self._share = share
        self._percents = dict.fromkeys(TIERS, 100.0) if share is None else percents(share)
        self._max_rows = {tier: budgets[tier] // self.row_bytes[tier] for tier in TIERS}
        self._free_rows = {tier: FreeRows() for tier in TIERS}
        self.by_tier: dict[Tier, list[torch.Tensor]] = {tier: [] for tier in TIERS}
        """A table `[rows, …]` for each layer; none where nothing lies, nor on disk."""
        self.num_blocks: dict[Tier, int] = dict.fromkeys(TIERS, 0)
        """Spans that have a block, by tier."""
        self._expected = 0
        self._refused: set[Tier] = set()
        """Tiers that could not grow; they are tried again when there are new jobs, not for each that waits."""
        self.refusal: str | None = None
        """Why a tier could not grow the last time that it should have; None if it could."""

    def _table(self, memory: torch.Tensor, shape: KVShape, tier: Tier) -> torch.Tensor:
        """Rows of numbers, or of bytes where they are encoded: `[rows, …]`."""
        rows = memory.view(-1, self.layer_row_bytes(shape, tier))
        return self.as_stored(rows, tier)

    def as_stored(self, rows: torch.Tensor, tier: Tier) -> torch.Tensor:
        """Bytes `[rows, row bytes]` of a table as numbers, or as they are where they are encoded."""
        return rows if self._codec is not None and tier != "device" else rows.view(self._dtype)

    def layer_row_bytes(self, shape: KVShape, tier: Tier) -> int:
        """Bytes of a token in a layer of that shape."""
        return cache_row_bytes([shape], self._dtype, self._codec)[tier]

    def expect(self, num_rows: int) -> None:
        """Tell that room for `num_rows` tokens will be asked for: growing copies, so it is better done once."""
        self._expected = max(self._expected, num_rows)
        self._refused.clear()

    def num_off_device(self, num_rows: int) -> int:
        """How many of so many rows of spans would lie off the device."""
        on_device = self._max_rows["device"] if self._share is None else round(num_rows * self._share.gpu / 100)
        return max(0, min(num_rows - on_device, self._max_rows["host"] + self._max_rows["disk"]))

    def allocate(self, num_rows: int) -> Block | None:
        """Room for a span of `num_rows` tokens; None when every tier that may hold it is full."""
        for tier in self._tiers_in_turn():
            first = self._free_rows[tier].take(num_rows)
            if first is None and self._grow(tier, num_rows):
                first = self._free_rows[tier].take(num_rows)
            if first is not None:
                self._expected = max(0, self._expected - num_rows)
                self.num_blocks[tier] += 1
                return Block(tier, first, num_rows)
        return None

    def free(self, block: Block) -> None:
        """Give a block back."""
        self._free_rows[block.tier].give(block.first, block.num_rows)
        self.num_blocks[block.tier] -= 1

    def _tiers_in_turn(self) -> list[Tier]:
        if self._share is None:
            return list(TIERS)
        total = sum(self.num_blocks.values()) + 1
        wanted = {tier: total * percent / 100 for tier, percent in self._percents.items() if percent > 0}
        lacking = {tier: count - self.num_blocks[tier] for tier, count in wanted.items()}
        return sorted(lacking, key=lambda tier: -lacking[tier])  # the others only where the first has no room

    def _grow(self, tier: Tier, num_rows: int) -> bool:
        free_rows = self._free_rows[tier]
        needed = free_rows.capacity - free_rows.tail_free() + num_rows
        if needed > self._max_rows[tier] or tier in self._refused:
            return False
        expected = needed + int(self._expected * self._percents[tier] / 100)
        capacity = min(self._max_rows[tier], max(expected, int(free_rows.capacity * _GROWTH)))
        for size in dict.fromkeys((capacity, needed)):  # a smaller step may do where the larger finds no memory
            try:
                self._make_room(tier, size)
            except (CapacityError, MemoryError, RuntimeError) as error:  # torch's own errors of memory are the last
                num_bytes = size * self.row_bytes[tier] / 1e9
                self.refusal = (
                    f"the KV cache cannot grow to {size} tokens, {num_bytes:.1f} GB on {tier}: {one_line(error)}"
                )
            else:
                self.refusal = None
                free_rows.grow(size)
                return True
        self._refused.add(tier)
        return False

    def _make_room(self, tier: Tier, capacity: int) -> None:
        """Let the tables of a tier have `capacity` rows; what they hold stays."""
        if tier == "disk":
            self._disk.grow(capacity)
            return
        self._settle()  # what is still under way to a table must not miss its copy
        tables = self.by_tier[tier]
        sizes = [capacity * self.layer_row_bytes(shape, tier) for shape in self._shapes]
        if not tables:
            blocks = self._new_blocks(sizes, tier)
            tables += [self._table(block, shape, tier) for block, shape in zip(blocks, self._shapes, strict=True)]
            return
        for layer, (size, shape) in enumerate(zip(sizes, self._shapes, strict=True)):
            old = tables[layer]
            if old.numel() * old.element_size() >= size:  # from a growth that failed at a later layer
                continue
            new = self._arena.empty(size, tier)  # one layer after the other, so that little is held twice
            new[: old.numel() * old.element_size()].copy_(old.flatten().view(torch.uint8))
            tables[layer] = self._table(new, shape, tier)
            self._arena.free(old)

    def _new_blocks(self, sizes: list[int], tier: Literal["device", "host"]) -> list[torch.Tensor]:
        """Memory for all layers at once, since page-locking takes its time; all or nothing."""
        with ThreadPoolExecutor(_ALLOCATING_THREADS) as pool:
            asked = [pool.submit(self._arena.empty, size, tier) for size in sizes]
        if failures := [error for future in asked if (error := future.exception()) is not None]:
            for future in asked:
                if future.exception() is None:
                    self._arena.free(future.result())
            raise failures[0]
        return [future.result() for future in asked]

    def close(self) -> None:
        """Let go of the tables; the arena frees them."""
        for tables in self.by_tier.values():
            tables.clear()


def cache_row_bytes(shapes: list[KVShape], dtype: torch.dtype, codec: Codec | None) -> dict[Tier, int]:
    """Bytes of a token's keys and values in all layers, by tier: off the device, as `codec` encodes them."""
    numbers = sum(shape.width for shape in shapes) * dtype.itemsize
    coded = numbers if codec is None else sum(codec.row_bytes(shape.width, dtype) for shape in shapes)
    return {"device": numbers, "host": coded, "disk": coded}
