"""Tables of rows, one per layer and tier, that grow on demand; each sequence has its rows on one tier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
_ANY = 1 << 40


class Tables:
    """Rows of bytes in tables of all layers on the three tiers, up to a budget of bytes a tier.

    Spans are spread over the tiers by `share` (counted in spans), or, without one, go to the device while it has room,
    then to the host, then to disk.
    """

    def __init__(
        self,
        sizes: dict[Tier, list[int]],
        dtypes: dict[Tier, torch.dtype],
        arena: Arena,
        budgets: dict[Tier, int],
        share: Share | None,
        disk: DiskRows,
        settle: Callable[[], None],
        what: str = "the KV cache cannot grow to {} tokens",
        *,
        counted: dict[Tier, int] | None = None,
    ) -> None:
        """sizes: the bytes of a row of each table, 0 for a layer without one; dtypes: how rows are viewed on each tier.

        counted: the bytes that a row counts as against the budgets, where other processes keep larger rows of the same
        spans; None: the bytes that it takes here. `settle` returns when no copy to a table is under way any more.
        `what` names the tables in messages.
        """
        self._sizes, self._dtypes, self._what = sizes, dtypes, what
        self.row_bytes: dict[Tier, int] = counted or {tier: sum(each) for tier, each in sizes.items()}
        """The bytes of one row over all tables, by tier."""
        self._arena, self._disk, self._settle = arena, disk, settle
        self._share = share
        self._percents = dict.fromkeys(TIERS, 100.0) if share is None else percents(share)
        self._max_rows = {tier: _rows(budgets[tier], self.row_bytes[tier]) for tier in TIERS}
        self.budgets = budgets
        """The bytes of each tier, shared with other tables (`beside`)."""
        self.beside: Tables | None = None
        """Other tables that share the budgets."""
        self._free_rows = {tier: FreeRows() for tier in TIERS}
        self.by_tier: dict[Tier, list[torch.Tensor]] = {tier: [] for tier in TIERS}
        """The tables `[rows, …]`; empty where no block is, and on disk."""
        self.num_blocks: dict[Tier, int] = dict.fromkeys(TIERS, 0)
        """The number of spans that have a block, by tier."""
        self._expected = 0
        self._refused: set[Tier] = set()
        """The tiers that could not grow; they are tried again when there are new jobs, not for each waiting one."""
        self.refusal: str | None = None
        """Why a tier could not grow at the last attempt; None if it could."""

    def _table(self, memory: torch.Tensor, size: int, tier: Tier) -> torch.Tensor:
        """View a table's memory as rows of numbers, or of bytes where they are encoded: `[rows, …]`."""
        return self.as_stored(memory.view(-1, size), tier) if size else memory.view(self._dtypes[tier])

    def as_stored(self, rows: torch.Tensor, tier: Tier) -> torch.Tensor:
        """View bytes `[rows, row bytes]` of a table as numbers; encoded rows stay bytes."""
        return rows.view(self._dtypes[tier])

    def expect(self, sizes: Sequence[int]) -> None:
        """Announce spans of so many tokens: growing a table copies it, so it should grow once for all of them."""
        self._expected = max(self._expected, sum(sizes))
        self._refused.clear()

    def num_off_device(self, num_rows: int) -> int:
        """The number of rows, of `num_rows` rows of spans, that would not fit the device."""
        on_device = self._max_rows["device"] if self._share is None else round(num_rows * self._share.gpu / 100)
        return max(0, min(num_rows - on_device, self._max_rows["host"] + self._max_rows["disk"]))

    def allocate(self, num_rows: int, *, with_state: bool = True) -> Block | None:
        """Allocate space for a span of `num_rows` tokens, which has no state; None when every allowed tier is full."""
        found = (self.allocate_on(tier, num_rows) for tier in self.tiers_in_turn())
        return next((block for block in found if block is not None), None)

    def allocate_on(self, tier: Tier, num_rows: int) -> Block | None:
        """Allocate space on one tier; None when it is full."""
        first = self._free_rows[tier].take(num_rows)
        if first is None and self._grow(tier, num_rows):
            first = self._free_rows[tier].take(num_rows)
        if first is None:
            return None
        self._expected = max(0, self._expected - num_rows)
        self.num_blocks[tier] += 1
        return Block(tier, first, num_rows)

    def free(self, block: Block) -> None:
        """Free a block."""
        self._free_rows[block.tier].give(block.first, block.num_rows)
        self.num_blocks[block.tier] -= 1

    def free_state(self, block: Block) -> Block:
        """Return the block that is left when its state is freed: the whole block, as these tables hold no states."""
        return block

    def release(self, tier: Tier) -> None:
        """Release the tables of a memory tier (not of the disk) in which no block lies."""
        assert not self.num_blocks[tier]
        self._settle()
        tables = self.by_tier[tier]
        for table in tables:
            self._arena.free(table)
        tables.clear()
        self._free_rows[tier] = FreeRows()
        self._refused.discard(tier)

    def num_rows(self, tier: Tier) -> int:
        """Rows that the tables have on a tier."""
        return self._free_rows[tier].capacity

    def be(self, tier: Tier, num_rows: int) -> None:
        """Resize a tier to as many rows, as another stage has allocated them; rows beyond the new size are lost.

        Raises `CapacityError` if there is no memory for them.
        """
        if num_rows < self.num_rows(tier):
            self.release(tier)
        if num_rows > self.num_rows(tier):
            self._make_room(tier, num_rows)
            self._free_rows[tier].grow(num_rows)

    def tiers_in_turn(self) -> list[Tier]:
        """The tiers on which a span may be placed, in order of preference."""
        if self._share is None:
            return list(TIERS)
        total = sum(self.num_blocks.values()) + 1
        wanted = {tier: total * percent / 100 for tier, percent in self._percents.items() if percent > 0}
        lacking = {tier: count - self.num_blocks[tier] for tier, count in wanted.items()}
        return sorted(lacking, key=lambda tier: -lacking[tier])  # the others only where the first has no room

    def taken(self, tier: Tier) -> int:
        """The number of bytes that the tables take on a tier."""
        return self._free_rows[tier].capacity * self.row_bytes[tier]

    def expected_bytes(self, tier: Tier) -> int:
        """The bytes that announced spans will need on a tier."""
        return int(self._expected * self._percents[tier] / 100) * self.row_bytes[tier]

    def _wanted(self, tier: Tier) -> int:
        """The bytes that the tables will take on a tier when all announced spans have come."""
        rows = self._free_rows[tier]
        used = rows.capacity - rows.num_free + int(self._expected * self._percents[tier] / 100)
        return max(rows.capacity, used) * self.row_bytes[tier]

    def _most_rows(self, tier: Tier) -> int:
        """The most rows that the tables may have on a tier, given the other tables that share its budget."""
        if self.beside is None:
            return self._max_rows[tier]
        left = self.budgets[tier] - self.beside.taken(tier)
        return min(self._max_rows[tier], _rows(left, self.row_bytes[tier]))

    def _fair_rows(self, tier: Tier, rows: int) -> int:
        """Reduce `rows` where the tables that share the budget would otherwise get less than their part."""
        if self.beside is None:
            return rows
        both = rows * self.row_bytes[tier] + self.beside._wanted(tier)
        return rows if both <= self.budgets[tier] else rows * self.budgets[tier] // both

    def _grow(self, tier: Tier, num_rows: int) -> bool:
        free_rows = self._free_rows[tier]
        needed = free_rows.capacity - free_rows.tail_free() + num_rows
        most = self._most_rows(tier)
        if needed > most or tier in self._refused:
            return False
        expected = needed + int(max(0, self._expected - num_rows) * self._percents[tier] / 100)
        wished = max(expected, int(free_rows.capacity * _GROWTH))
        capacity = min(most, max(needed, self._fair_rows(tier, wished)))
        for size in dict.fromkeys((capacity, needed)):  # a smaller step may do where the larger finds no memory
            try:
                self._make_room(tier, size)
            except (CapacityError, MemoryError, RuntimeError) as error:  # torch's own errors of memory are the last
                num_bytes = size * self.row_bytes[tier] / 1e9
                self.refusal = f"{self._what.format(size)}, {num_bytes:.1f} GB on {tier}: {one_line(error)}"
            else:
                self.refusal = None
                free_rows.grow(size)
                return True
        self._refused.add(tier)
        return False

    def _make_room(self, tier: Tier, capacity: int) -> None:
        """Grow the tables of a tier to `capacity` rows; their contents stay."""
        if tier == "disk":
            self._disk.grow(capacity)
            return
        self._settle()  # what is still under way to a table must not miss its copy
        tables = self.by_tier[tier]
        sizes = [capacity * row_bytes for row_bytes in self._sizes[tier]]
        if not tables:
            blocks = self._new_blocks(sizes, tier)
            tables += [self._table(*each, tier) for each in zip(blocks, self._sizes[tier], strict=True)]
            return
        for layer, (size, row_bytes) in enumerate(zip(sizes, self._sizes[tier], strict=True)):
            old = tables[layer]
            if old.numel() * old.element_size() >= size:  # from a growth that failed at a later layer
                continue
            new = self._arena.empty(size, tier)  # one layer after the other, so that little is held twice
            new[: old.numel() * old.element_size()].copy_(old.flatten().view(torch.uint8))
            tables[layer] = self._table(new, row_bytes, tier)
            self._arena.free(old)

    def _new_blocks(self, sizes: list[int], tier: Literal["device", "host"]) -> list[torch.Tensor]:
        """Allocate memory for all layers at once, since page-locking takes time; all or nothing."""
        with ThreadPoolExecutor(_ALLOCATING_THREADS) as pool:
            asked = [pool.submit(self._arena.empty, size, tier) for size in sizes]
        if failures := [error for future in asked if (error := future.exception()) is not None]:
            for future in asked:
                if future.exception() is None:
                    self._arena.free(future.result())
            raise failures[0]
        return [future.result() for future in asked]

    def close(self) -> None:
        """Release the tables; the arena frees them."""
        for tables in self.by_tier.values():
            tables.clear()


def _rows(num_bytes: int, row_bytes: int) -> int:
    """The number of rows that fit into so many bytes; unlimited for rows of no bytes."""
    return max(0, num_bytes) // row_bytes if row_bytes else _ANY


def cache_row_bytes(shapes: list[KVShape], dtype: torch.dtype, codec: Codec | None) -> dict[Tier, int]:
    """The bytes of a token's keys and values in all layers, by tier: on host and disk, as `codec` encodes them."""
    numbers = sum(shape.width for shape in shapes) * dtype.itemsize
    coded = numbers if codec is None else sum(codec.row_bytes(shape.width) for shape in shapes)
    return {"device": numbers, "host": coded, "disk": coded}
