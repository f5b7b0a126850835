"""The KV cache: rows of keys and values on three tiers, whole sequences on one tier each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from engine.batch.decode_group import DecodeGroup
from engine.batch.micro_batch import MicroBatch
from engine.batch.rows import Rows, Scatter
from engine.cache.ahead import Ahead
from engine.cache.layer_memory import LayerMemory
from engine.cache.shape import KVShape
from engine.cache.tables import Tables, cache_row_bytes
from engine.cache.transfer import KVTransfer, put_rows
from engine.kernels.codec import Codec
from engine.memory.arena import Arena
from engine.memory.disk.rows import DiskRows
from engine.memory.tiers import TIERS, Tier
from engine.policy import Share
from engine.schedule.sequence import Prefix, Span


class KVCache(LayerMemory):
    """Keys and values of spans, as rows `[keys | values | index key]` of one table per layer and tier.

    With a codec, every row is rounded to the value of its code as soon as it is computed, and host and disk hold the
    codes: a result depends on the codec, but not on where a row lies or when it is read.

    Tables grow on demand up to their budget. Sequences are spread over the tiers by `share` (counted in sequences), or,
    without one, go to the device while it has room, then to the host, then to disk.
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
        counted: dict[Tier, int] | None = None,
    ) -> None:
        """counted: bytes that a row counts as against the budgets, by tier; None: what it takes here."""
        self.shapes = shapes
        self.dtype = dtype
        self.bits = 0 if codec is None else codec.bits
        """The bits of codes on host and disk; 0 without codes."""
        self.codec = codec
        """The codec that rounds every row, and encodes those on host and disk; None without one."""
        self._arena = arena
        self._compute_on_host = compute_on_host
        self._fresh: dict[int, torch.Tensor] = {}
        self._fresh_layer = -1
        self._transfer = KVTransfer(arena.device)
        by_layer = [cache_row_bytes([shape], dtype, codec) for shape in shapes]
        sizes = {tier: [each[tier] for each in by_layer] for tier in TIERS}
        dtypes = {tier: dtype if codec is None or tier == "device" else torch.uint8 for tier in TIERS}
        self._disk = DiskRows(arena, sizes["disk"])
        self.room = Tables(sizes, dtypes, arena, budgets, share, self._disk, self._transfer.settle, counted=counted)
        """The allocator of rows."""
        from_host = self._transfer.is_asynchronous and not compute_on_host
        places = self.room, self._transfer, self._disk, arena.device
        self._ahead = Ahead[DecodeGroup](*places, _runs, from_host=from_host)
        """The own tokens of decode groups."""

    def stage_ahead(self, batches: Sequence[Rows], layers: Iterable[int] | None = None) -> None:
        """Prepare a sweep over micro-batches: from now on the cache may read what the sweep before wrote.

        layers: the layers that the sweep passes, in order; None: all.
        """
        self._transfer.settle()
        self._disk.settle()
        self._fresh, self._fresh_layer = {}, -1  # of spans that may be gone: their ids come again
        groups = [group for batch in batches if isinstance(batch, MicroBatch) for group in batch.decode_groups]
        ahead = [group for group in groups if self._ahead.brings(group)]
        passed = [
            layer for layer in (range(len(self.shapes)) if layers is None else layers) if self.shapes[layer].width
        ]
        self._ahead.begin((layer, group) for layer in passed for group in ahead)

    def write(self, layer: int, batch: Rows, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Store a micro-batch's `new` keys and values `[rows, heads, dim]` of a layer in their blocks.

        Where the layer has index keys, those `[rows, index width]` are the third. Returns all exactly as later steps
        will read them (after encoding); otherwise results would depend on scheduling.
        """
        coded = None
        if self.codec is not None:
            coded = self.codec.encode_rows(pack(*new))
            decoded = self.codec.decode_rows(coded, self.shapes[layer].width, self.dtype)
            new = (*self._unpack_flat(layer, decoded), *([self.index_keys(layer, decoded)] if len(new) > 2 else []))
        if layer != self._fresh_layer:
            self._fresh, self._fresh_layer = {}, layer
        if batch.device_slots is not None:
            kept = batch.device_rows
            rows = pack(*(x if kept is None else x.index_select(0, kept) for x in new))
            self.room.by_tier["device"][layer].index_copy_(0, batch.device_slots, rows)
        if batch.scattered is not None:
            self._scatter(layer, batch.scattered, new, coded)
        packed = pack(*new) if batch.offloaded and coded is None else coded
        stores: list[tuple[torch.Tensor, torch.Tensor]] = []
        to_disk: list[tuple[int, torch.Tensor]] = []
        for segment, block in batch.offloaded:
            taken = slice(segment.first, segment.first + segment.num_rows)
            assert packed is not None
            stored = packed[taken]
            if isinstance(segment.span, Prefix):
                self._fresh[id(segment.span)] = pack(*(x[taken] for x in new))
            first = block.first + segment.past
            if block.tier == "disk":
                to_disk.append((first, stored))
            else:
                stores.append((stored, self.room.by_tier["host"][layer][first : first + segment.num_rows]))
        if stores:
            self._transfer.store(stores)
        if to_disk:
            self._disk.write(layer, to_disk)
        for segment in batch.passing:
            taken = slice(segment.first, segment.first + segment.num_rows)
            self._fresh[id(segment.span)] = pack(*(x[taken] for x in new))
        return new

    def _scatter(self, layer: int, scatter: Scatter, new: tuple[torch.Tensor, ...], coded: torch.Tensor | None) -> None:
        taken, table = scatter.rows, self.room.by_tier["host"][layer]
        if coded is not None:
            rows = coded if taken is None else coded.index_select(0, taken)
        else:
            rows = pack(*(x if taken is None else x.index_select(0, taken) for x in new))
        if self._compute_on_host:  # it is attended to there, at once
            put_rows(rows.cpu(), table, scatter.slots)
        else:
            self._transfer.scatter(rows, table, scatter.slots)

    def fork(self, layer: int, chain: tuple[Prefix, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[heads, length, dim]` of a chain of prefixes, on the device."""
        return self.unpack(layer, self.prefix_rows(layer, chain))

    def fork_flat(self, layer: int, chains: Iterable[tuple[Prefix, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of several chains, concatenated: `[rows, heads, dim]`, on the device."""
        return self._unpack_flat(layer, self.prefix_rows(layer, [prefix for chain in chains for prefix in chain]))

    def prefix_rows(self, layer: int, prefixes: Sequence[Prefix]) -> torch.Tensor:
        """Rows `[length, width]` of prefixes, concatenated, on the device."""
        parts = [self.read(layer, prefix, len(prefix.tokens)) for prefix in prefixes]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read(self, layer: int, span: Span, num_rows: int) -> torch.Tensor:
        """The first rows `[num_rows, width]` of a span, on the device."""
        fresh = self._fresh.get(id(span)) if layer == self._fresh_layer else None
        if fresh is not None:  # just computed: it has no other place, or is still under way to it
            return fresh
        block = span.block
        assert block is not None
        if block.tier == "disk":
            rows = self.room.as_stored(self._disk.fetch(layer, [(block.first, num_rows)]).rows(), "disk")
        else:
            rows = self.room.by_tier[block.tier][layer][block.first : block.first + num_rows]
        if block.tier == "device":
            return rows
        is_kept = block.tier != "disk" or self._transfer.is_asynchronous  # until the copy has been made
        decoded = self.decoded(layer, rows.to(self._arena.device, non_blocking=is_kept))
        if block.tier == "disk" and isinstance(span, Prefix) and layer == self._fresh_layer:
            self._fresh[id(span)] = decoded  # others of this layer need not read it once more
        return decoded

    def decoded(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """Decode rows of a table that is not on the device, to numbers `[rows, width]`."""
        if self.codec is None:
            return rows
        return self.codec.decode_rows(rows, self.shapes[layer].width, self.dtype)

    def is_attended_on_host(self, group: DecodeGroup) -> bool:
        """Whether the policy has a decode group's attention computed on the host, where its keys and values are."""
        return self._compute_on_host and group.tier == "host"

    def host_table(self, layer: int) -> torch.Tensor:
        """A layer's table of keys and values on the host, `[rows, …]`: numbers, or their codes."""
        return self.room.by_tier["host"][layer]

    def device_table(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's table of keys and values on the device, `[rows, heads, dim]` each."""
        return self._unpack_flat(layer, self.room.by_tier["device"][layer])

    def device_places(self) -> list[int]:
        """The addresses of the device's tables; they change when the tables grow."""
        return [table.data_ptr() for table in self.room.by_tier["device"]]

    def own(self, layer: int, group: DecodeGroup, *new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a decode group's own tokens, the new ones included: `[sequences, heads, length, dim]`.

        `new` are the group's new rows, as `write` returned them. The result is on the host for a group that is
        attended to there. Rows beyond a sequence's length are copies of its last one.
        """
        return self.unpack(layer, self.own_rows(layer, group, *new))

    def own_rows(self, layer: int, group: DecodeGroup, *new: torch.Tensor) -> torch.Tensor:
        """The own keys and values of a decode group (as `own` returns them) as rows `[sequences, length, width]`."""
        rows = self._own_table(layer, group, *new)
        rows = rows.index_select(0, group.own_index.to(rows.device))
        return rows.view(len(group.segments), group.length, -1)

    def own_flat(self, layer: int, group: DecodeGroup, *new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The own keys and values of a decode group as `[rows, heads, dim]`; each sequence begins at its `own_borders`.

        Where all of them are on the device, that is the whole table: nothing is copied.
        """
        return self._unpack_flat(layer, self._own_table(layer, group, *new))

    def _own_table(self, layer: int, group: DecodeGroup, *new: torch.Tensor) -> torch.Tensor:
        """A table of rows `[…, width]` in which the group's own tokens begin at its `own_borders`."""
        if group.is_on_device:
            return self.room.by_tier["device"][layer]
        if not self._ahead.brings(group):  # the new rows are there already
            runs = self._ahead.stored(layer, group)
            return self.decoded(layer, runs[0] if len(runs) == 1 else torch.cat(runs))
        rows = self.decoded(layer, self._ahead.take(layer, group))
        rows.index_copy_(0, group.new_index.to(rows.device), pack(*new))
        return rows

    def unpack(self, layer: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Split rows `[…, length, width]` into keys and values `[…, heads, length, dim]`."""
        shape = self.shapes[layer]
        keys, values, _ = rows.split(shape.parts, dim=-1)
        keys = keys.unflatten(-1, (shape.key_heads, shape.key_dim)).transpose(-3, -2)
        return keys, values.unflatten(-1, (shape.value_heads, shape.value_dim)).transpose(-3, -2)

    def index_keys(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """The index keys `[…, length, index width]` of rows."""
        index: torch.Tensor = rows.split(self.shapes[layer].parts, dim=-1)[2]
        return index

    def _unpack_flat(self, layer: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Split rows `[rows, width]` into keys and values `[rows, heads, dim]`."""
        key, value = self.unpack(layer, rows)
        return key.transpose(0, 1), value.transpose(0, 1)

    def close(self) -> None:
        """Release the tables; the arena frees them."""
        self._transfer.close()
        self._disk.close()
        self.room.close()
        self._fresh = {}


def _runs(group: DecodeGroup) -> list[tuple[int, int]]:
    return [(run.first, run.end - run.first) for run in group.stored_runs]


def pack(*new: torch.Tensor) -> torch.Tensor:
    """Rows `[rows, width]` of keys and values `[rows, heads, dim]`, and index keys if there are any."""
    return torch.cat([x.flatten(1) for x in new], dim=1)
