"""The KV cache: rows of keys and values on three tiers, whole sequences on one tier each."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from engine.batch.decode_group import DecodeGroup
from engine.batch.micro_batch import MicroBatch
from engine.batch.rows import Rows, Scatter
from engine.cache.shape import KVShape
from engine.cache.transfer import KVTransfer, put_rows
from engine.errors import CapacityError
from engine.kernels.codec import GROUP, Codec
from engine.memory.arena import Arena
from engine.memory.disk.rows import DiskRows, Fetch
from engine.memory.free_rows import Extents
from engine.memory.tiers import TIERS, Tier, percents
from engine.planning.limits import STAGING_BUFFERS
from engine.policy import Share
from engine.schedule.block import Block
from engine.schedule.sequence import Prefix, Span

_GROWTH = 1.5
_ALLOCATING_THREADS = 8


class KVCache:
    """Keys and values of spans, as rows `[keys | values]` of one table per layer and tier.

    With a codec, every row is rounded to what its code stands for as soon as it is computed, and host and disk hold the
    codes: a result depends on the codec, but not on where a row lies or when it is read.

    Tables grow on demand up to their budget. Sequences go to the tiers by `share` (counted in sequences), or, without
    one, to the device while it has room, then to the host, then to disk.
    """

    def __init__(
        self,
        shapes: list[KVShape],
        dtype: torch.dtype,
        arena: Arena,
        budgets: dict[Tier, int],
        share: Share | None,
        *,
        codec: Codec | None = None,
        compute_on_host: bool = False,
    ) -> None:
        self.shapes = shapes
        self.dtype = dtype
        self.bits = 0 if codec is None else codec.bits
        """Of the codes off the device; 0 for none."""
        self._codec = codec
        self.row_bytes = cache_row_bytes(shapes, dtype, codec)
        """Bytes of one token over all layers, by tier."""
        self._arena = arena
        self._share = share
        self._percents = dict.fromkeys(TIERS, 100.0) if share is None else percents(share)
        self._compute_on_host = compute_on_host
        self._max_rows = {tier: budgets[tier] // self.row_bytes[tier] for tier in TIERS}
        self._extents = {tier: Extents() for tier in TIERS}
        self._tables: dict[Tier, list[torch.Tensor]] = {tier: [] for tier in TIERS}
        self.num_blocks: dict[Tier, int] = dict.fromkeys(TIERS, 0)
        """Spans that have a block, by tier."""
        self._expected = 0
        self._fresh: dict[int, torch.Tensor] = {}
        self._fresh_layer = -1
        self._transfer = KVTransfer(arena.device)
        self._stages = self._transfer.is_asynchronous and not compute_on_host
        """Whether own tokens off the device are brought there ahead of their turn."""
        self._coming: Iterator[tuple[int, DecodeGroup]] = iter(())
        self._staged: deque[tuple[int, DecodeGroup, tuple[torch.Tensor, Any] | Fetch]] = deque()
        """Layer and group whose own tokens are under way: from the host with the event of arrival, or from disk."""
        self._disk = DiskRows(arena, [self._row_bytes(shape, "disk") for shape in shapes])

    def _table(self, memory: torch.Tensor, shape: KVShape, tier: Tier) -> torch.Tensor:
        """Rows of numbers, or of bytes where they are encoded: `[rows, …]`."""
        rows = memory.view(-1, self._row_bytes(shape, tier))
        return self._as_stored(rows, tier)

    def _as_stored(self, rows: torch.Tensor, tier: Tier) -> torch.Tensor:
        return rows if self._codec is not None and tier != "device" else rows.view(self.dtype)

    def _row_bytes(self, shape: KVShape, tier: Tier) -> int:
        return cache_row_bytes([shape], self.dtype, self._codec)[tier]

    def expect(self, num_rows: int) -> None:
        """Tell that room for `num_rows` tokens will be asked for: growing copies, so it is better done once."""
        self._expected = max(self._expected, num_rows)

    def num_off_device(self, num_rows: int) -> int:
        """How many of so many rows of spans would lie off the device."""
        on_device = self._max_rows["device"] if self._share is None else round(num_rows * self._share.gpu / 100)
        return max(0, min(num_rows - on_device, self._max_rows["host"] + self._max_rows["disk"]))

    def allocate(self, num_rows: int) -> Block | None:
        """Room for a span of `num_rows` tokens; None when the tier it belongs to (or every tier) is full."""
        for tier in self._tiers_in_turn():
            first = self._extents[tier].take(num_rows)
            if first is None and self._grow(tier, num_rows):
                first = self._extents[tier].take(num_rows)
            if first is not None:
                self._expected = max(0, self._expected - num_rows)
                self.num_blocks[tier] += 1
                return Block(tier, first, num_rows)
        return None

    def free(self, block: Block) -> None:
        """Give a block back."""
        self._extents[block.tier].give(block.first, block.num_rows)
        self.num_blocks[block.tier] -= 1

    def _tiers_in_turn(self) -> list[Tier]:
        if self._share is None:
            return list(TIERS)
        total = sum(self.num_blocks.values()) + 1
        wanted = {tier: total * percent / 100 for tier, percent in self._percents.items() if percent > 0}
        lacking = {tier: count - self.num_blocks[tier] for tier, count in wanted.items()}
        return [max(lacking, key=lambda tier: lacking[tier])]

    def _grow(self, tier: Tier, num_rows: int) -> bool:
        extents = self._extents[tier]
        needed = extents.capacity - extents.tail_free() + num_rows
        if needed > self._max_rows[tier]:
            return False
        expected = needed + int(self._expected * self._percents[tier] / 100)
        capacity = min(self._max_rows[tier], max(expected, int(extents.capacity * _GROWTH)))
        if tier == "disk":
            try:
                self._disk.grow(capacity)
            except CapacityError as error:  # it speaks of one layer's file
                size = capacity * self.row_bytes[tier] / 1e9
                raise CapacityError(
                    f"the KV cache cannot grow to {capacity} tokens, {size:.1f} GB on disk: {error}"
                ) from None
            extents.grow(capacity)
            return True
        self._transfer.settle()  # what is still under way to a table must not miss its copy
        tables = self._tables[tier]
        sizes = [capacity * self._row_bytes(shape, tier) for shape in self.shapes]
        if not tables:  # page-locking takes its time: all layers at once
            with ThreadPoolExecutor(_ALLOCATING_THREADS) as pool:
                blocks = list(pool.map(lambda size: self._arena.empty(size, tier), sizes))
            tables += [self._table(block, shape, tier) for block, shape in zip(blocks, self.shapes, strict=True)]
        else:
            for layer, (size, shape) in enumerate(zip(sizes, self.shapes, strict=True)):
                # One layer after the other, so that little is held twice.
                new, old = self._arena.empty(size, tier), tables[layer]
                new[: old.numel() * old.element_size()].copy_(old.flatten().view(torch.uint8))
                tables[layer] = self._table(new, shape, tier)
                self._arena.free(old)
        extents.grow(capacity)
        return True

    def begin_sweep(self, batches: Sequence[Rows]) -> None:
        """To be called before a sweep over micro-batches: from now on it may read what the sweep before wrote."""
        self._transfer.settle()
        self._disk.settle()
        self._fresh, self._fresh_layer = {}, -1  # of spans that may be gone: their ids come again
        groups = [group for batch in batches if isinstance(batch, MicroBatch) for group in batch.decode_groups]
        ahead = [group for group in groups if self._is_ahead(group)]
        self._coming = ((layer, group) for layer in range(len(self.shapes)) for group in ahead)
        self._staged.clear()
        for _ in range(STAGING_BUFFERS - 1):
            self._fetch_next()

    def _is_ahead(self, group: DecodeGroup) -> bool:
        """Whether a group's own tokens are brought ahead of their turn."""
        return group.tier == "disk" or (self._stages and group.tier == "host")

    def _fetch_next(self) -> None:
        """Start bringing the own tokens that will be attended to after those that were fetched last."""
        following = next(self._coming, None)
        if following is None:
            return
        layer, group = following
        if group.tier == "disk":
            runs = [(run.first, run.end - run.first) for run in group.stored_runs]
            self._staged.append((layer, group, self._disk.fetch(layer, runs)))
        else:
            self._staged.append((layer, group, self._transfer.fetch(self._stored_rows(layer, group))))

    def _stored_rows(self, layer: int, group: DecodeGroup) -> list[torch.Tensor]:
        """What is stored of a group on the host, run by run."""
        return [self._tables["host"][layer][run.first : run.end] for run in group.stored_runs]

    def write(
        self, layer: int, batch: Rows, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a micro-batch's new keys and values `[rows, heads, dim]` of a layer in their blocks.

        Returns them as they will be read later: to attend to anything else would make results depend on who does when.
        """
        coded = None
        if self._codec is not None:
            coded = self._codec.encode_rows(pack(key, value))
            key, value = self._unpack_flat(layer, self._codec.decode_rows(coded, self.shapes[layer].width, self.dtype))
        if layer != self._fresh_layer:
            self._fresh, self._fresh_layer = {}, layer
        if batch.device_slots is not None:
            kept = batch.device_rows
            rows = pack(key, value) if kept is None else pack(key.index_select(0, kept), value.index_select(0, kept))
            self._tables["device"][layer].index_copy_(0, batch.device_slots, rows)
        if batch.scattered is not None:
            self._scatter(layer, batch.scattered, key, value, coded)
        packed = pack(key, value) if batch.offloaded and coded is None else coded
        stores: list[tuple[torch.Tensor, torch.Tensor]] = []
        to_disk: list[tuple[int, torch.Tensor]] = []
        for segment, block in batch.offloaded:
            taken = slice(segment.first, segment.first + segment.num_rows)
            assert packed is not None
            stored = packed[taken]
            if isinstance(segment.span, Prefix):
                self._fresh[id(segment.span)] = pack(key[taken], value[taken])
            first = block.first + segment.past
            if block.tier == "disk":
                to_disk.append((first, stored))
            else:
                stores.append((stored, self._tables["host"][layer][first : first + segment.num_rows]))
        if stores:
            self._transfer.store(stores)
        if to_disk:
            self._disk.write(layer, to_disk)
        for segment in batch.passing:
            taken = slice(segment.first, segment.first + segment.num_rows)
            self._fresh[id(segment.span)] = pack(key[taken], value[taken])
        return key, value

    def _scatter(
        self, layer: int, scatter: Scatter, key: torch.Tensor, value: torch.Tensor, coded: torch.Tensor | None
    ) -> None:
        taken, table = scatter.rows, self._tables["host"][layer]
        if coded is not None:
            rows = coded if taken is None else coded.index_select(0, taken)
        else:
            rows = pack(*(x if taken is None else x.index_select(0, taken) for x in (key, value)))
        if self._compute_on_host:  # it is attended to there, at once
            put_rows(rows.cpu(), table, scatter.slots)
        else:
            self._transfer.scatter(rows, table, scatter.slots)

    def prefix(self, layer: int, chain: tuple[Prefix, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[heads, length, dim]` of a chain of prefixes, on the device."""
        parts = [self.stored(layer, prefix, len(prefix.tokens)) for prefix in chain]
        return self.unpack(layer, parts[0] if len(parts) == 1 else torch.cat(parts))

    def stored(self, layer: int, span: Span, num_rows: int) -> torch.Tensor:
        """The first rows `[num_rows, width]` of a span, on the device."""
        fresh = self._fresh.get(id(span)) if layer == self._fresh_layer else None
        if fresh is not None:  # just computed: it has no other place, or is still under way to it
            return fresh
        block = span.block
        assert block is not None
        if block.tier == "disk":
            rows = self._as_stored(self._disk.fetch(layer, [(block.first, num_rows)]).rows(), "disk")
        else:
            rows = self._tables[block.tier][layer][block.first : block.first + num_rows]
        if block.tier == "device":
            return rows
        is_kept = block.tier != "disk" or self._transfer.is_asynchronous  # until the copy has been made
        decoded = self.decoded(layer, rows.to(self._arena.device, non_blocking=is_kept))
        if block.tier == "disk" and isinstance(span, Prefix) and layer == self._fresh_layer:
            self._fresh[id(span)] = decoded  # others of this layer need not read it once more
        return decoded

    def decoded(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """Rows of a table off the device as numbers `[rows, width]`."""
        if self._codec is None:
            return rows
        return self._codec.decode_rows(rows, self.shapes[layer].width, self.dtype)

    def is_attended_on_host(self, group: DecodeGroup) -> bool:
        """Whether a decode group's attention is computed where its keys and values are, as the policy may want it."""
        return self._compute_on_host and group.tier == "host"

    def host_table(self, layer: int) -> torch.Tensor:
        """Rows of a layer's keys and values on the host, `[rows, …]`: numbers, or their codes."""
        return self._tables["host"][layer]

    def own(
        self, layer: int, group: DecodeGroup, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a decode group's own tokens, the new ones included: `[sequences, heads, length, dim]`.

        `key`, `value` are the group's new rows `[rows, heads, dim]`, as `write` returned them. The result is on the
        host for a group that is attended to there. Rows beyond a sequence's length are copies of its last one.
        """
        rows = self._own_table(layer, group, key, value)
        rows = rows.index_select(0, group.own_index.to(rows.device))
        return self.unpack(layer, rows.view(len(group.segments), group.length, -1))

    def own_flat(
        self, layer: int, group: DecodeGroup, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as `[rows, heads, dim]`, each sequence from its `own_borders` on.

        Where all lie on the device, that is the whole table: nothing is copied.
        """
        return self._unpack_flat(layer, self._own_table(layer, group, key, value))

    def _own_table(self, layer: int, group: DecodeGroup, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Rows `[…, width]` in which the group's own tokens begin at its `own_borders`."""
        if group.is_on_device:
            return self._tables["device"][layer]
        if not self._is_ahead(group):  # the new rows are there already
            runs = self._stored_rows(layer, group)
            return self.decoded(layer, runs[0] if len(runs) == 1 else torch.cat(runs))
        of_layer, of_group, fetched = self._staged.popleft()
        assert of_layer == layer
        assert of_group is group
        if isinstance(fetched, Fetch):
            staged = self._as_stored(fetched.rows(), "disk")
            staged = staged.to(key.device, non_blocking=self._transfer.is_asynchronous)
        else:
            staged = fetched[0]
            self._transfer.await_arrival(fetched[1])
        self._fetch_next()
        rows = self.decoded(layer, staged)
        rows.index_copy_(0, group.new_index.to(rows.device), pack(key, value))
        return rows

    def unpack(self, layer: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Split rows `[…, length, width]` into keys and values `[…, heads, length, dim]`."""
        shape = self.shapes[layer]
        keys, values = rows.split((shape.key_width, shape.width - shape.key_width), dim=-1)
        keys = keys.unflatten(-1, (shape.key_heads, shape.key_dim)).transpose(-3, -2)
        return keys, values.unflatten(-1, (shape.value_heads, shape.value_dim)).transpose(-3, -2)

    def _unpack_flat(self, layer: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, of rows `[rows, width]`, as `[rows, heads, dim]`."""
        key, value = self.unpack(layer, rows)
        return key.transpose(0, 1), value.transpose(0, 1)

    def close(self) -> None:
        """Let go of the tables; the arena frees them."""
        self._transfer.close()
        self._disk.close()
        self._tables = {tier: [] for tier in TIERS}
        self._fresh = {}


def cache_row_bytes(shapes: list[KVShape], dtype: torch.dtype, codec: Codec | None) -> dict[Tier, int]:
    """Bytes of a token's keys and values in all layers, by tier: off the device, as `codec` encodes them."""
    numbers = sum(shape.width for shape in shapes) * dtype.itemsize
    coded = numbers if codec is None else sum(codec.row_bytes(shape.width, dtype) for shape in shapes)
    return {"device": numbers, "host": coded, "disk": coded}


def unencodable_layer(shapes: list[KVShape]) -> int | None:
    """The first layer whose keys and values no codec takes; None if there is none."""
    return next((layer for layer, shape in enumerate(shapes) if shape.width % GROUP), None)


def pack(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Rows `[rows, width]` of keys and values `[rows, heads, dim]`."""
    return torch.cat((key.flatten(1), value.flatten(1)), dim=1)
