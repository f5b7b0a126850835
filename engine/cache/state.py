"""Recurrent states of spans on three tiers: what state-space and convolution layers keep of a sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from engine.batch.rows import Rows
from engine.batch.state_group import StateGroup
from engine.cache.ahead import Ahead
from engine.cache.state_shape import StateShape, StateTensor
from engine.cache.tables import Tables
from engine.cache.transfer import KVTransfer
from engine.memory.arena import Arena
from engine.memory.disk.rows import DiskRows
from engine.memory.tiers import TIERS, Tier
from engine.policy import Share
from engine.schedule.sequence import Prefix

State = list[torch.Tensor]
"""The state of one layer: a tensor `[spans, …]` for each tensor of its shape."""


class StateCache:
    """Recurrent states after the last token of spans: one slot each, a row of one table per tensor of a layer and tier.

    A state changes with every token, so it is read once in a sweep and written back: a sweep cannot be repeated with
    the states that it left.
    """

    def __init__(
        self,
        shapes: Sequence[StateShape | None],
        arena: Arena,
        budgets: dict[Tier, int],
        share: Share | None,
        *,
        counted: dict[Tier, int] | None = None,
    ) -> None:
        """shapes: the state's shape in each layer; None for a layer that keeps no state. counted: as for `Tables`."""
        self._arena = arena
        self._tensors: list[list[tuple[int, StateTensor]]] = []
        """The tensors of each layer's state, each with the number of its tables."""
        count = 0
        for shape in shapes:
            tensors = () if shape is None else shape.tensors
            self._tensors.append(list(enumerate(tensors, count)))
            count += len(tensors)
        sizes = [tensor.num_bytes for tensors in self._tensors for _, tensor in tensors]
        self._transfer = KVTransfer(arena.device if sizes else torch.device("meta"))  # no streams where nothing moves
        self._disk = DiskRows(arena, sizes)
        self.room = Tables(
            dict.fromkeys(TIERS, sizes),
            dict.fromkeys(TIERS, torch.uint8),
            arena,
            budgets,
            share,
            self._disk,
            self._transfer.settle,
            "the states of sequences cannot grow to {} of them",
            counted=counted,
        )
        """The allocator of slots."""
        self._fresh: dict[int, State] = {}
        """States in the current layer of prefixes that were computed in this sweep, or read from other tiers, until
        the spans that continue them have begun."""
        self._users: dict[int, int] = {}
        """The number of segments of the sweep that continue each prefix."""
        self._to_come: dict[int, int] = {}
        """The number of these that have not begun in the current layer."""
        self._layer = -1
        places = self.room, self._transfer, self._disk, arena.device
        self._ahead = Ahead[StateGroup](*places, _runs, from_host=self._transfer.is_asynchronous)
        """The states that groups continue."""

    def stage_ahead(self, batches: Sequence[Rows], layers: Iterable[int] | None = None) -> None:
        """Begin a sweep over micro-batches: start to bring the states that are not on the device there.

        layers: those that the sweep passes, in their order; None: all.
        """
        self._transfer.settle()
        self._disk.settle()
        self._fresh, self._layer, self._users = {}, -1, {}
        for group in (group for batch in batches for group in batch.state_groups):
            for prefix, count in zip(group.prefixes, group.num_continuing, strict=True):
                self._users[id(prefix)] = self._users.get(id(prefix), 0) + count
        groups = [group for batch in batches for group in batch.state_groups if self._ahead.brings(group)]
        passed = range(len(self._tensors)) if layers is None else layers
        self._ahead.begin((table, group) for layer in passed for group in groups for table, _ in self._tensors[layer])

    def begin(self, layer: int, group: StateGroup) -> State | None:
        """The state that a group's rows continue in a layer, on the device; None at the start. It may be changed.

        It must be called once for each group and layer, in the order of the sweep.
        """
        if layer != self._layer:
            self._fresh, self._to_come, self._layer = {}, dict(self._users), layer
        if group.source == "nothing":
            return None
        if group.source == "own":
            return [_seen(self._own(group, table), tensor) for table, tensor in self._tensors[layer]]
        parts = [self._behind(layer, prefix) for prefix in group.prefixes]
        states = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]  # which copies
        for prefix, count in zip(group.prefixes, group.num_continuing, strict=True):
            self._to_come[id(prefix)] -= count
            if not self._to_come[id(prefix)]:
                self._fresh.pop(id(prefix), None)
        taken = group.of_prefixes
        return states if taken is None else [state.index_select(0, taken) for state in states]

    def _own(self, group: StateGroup, table: int) -> torch.Tensor:
        """Rows `[segments, bytes]` of a group's own slots, copied to the device."""
        if group.tier == "device":
            assert group.device_slots is not None
            return self.room.by_tier["device"][table].index_select(0, group.device_slots)
        if not self._ahead.brings(group):
            return torch.cat(self._ahead.stored(table, group)).to(self._arena.device)
        rows = self._ahead.take(table, group)
        return rows.clone() if group.tier == "host" else rows  # the buffer is needed for others meanwhile

    def _behind(self, layer: int, prefix: Prefix) -> State:
        """The state `[1, …]` after a prefix's last token, on the device; it must not be changed."""
        fresh = self._fresh.get(id(prefix))
        if fresh is not None:
            return fresh
        block = prefix.block
        assert block is not None
        assert block.slot is not None
        state = []
        for table, tensor in self._tensors[layer]:
            if block.tier == "disk":
                rows = self._disk.fetch(table, [(block.slot, 1)]).rows()
            else:
                rows = self.room.by_tier[block.tier][table][block.slot : block.slot + 1]
            is_kept = block.tier != "disk" or self._transfer.is_asynchronous  # until the copy has been made
            state.append(_seen(rows.to(self._arena.device, non_blocking=is_kept), tensor))
        if block.tier != "device":
            self._fresh[id(prefix)] = state
        return state

    def write(self, layer: int, group: StateGroup, state: State) -> None:
        """Store the states `[segments, …]` that a group's rows leave in a layer."""
        for at, prefix in group.read_on:
            if self._to_come.get(id(prefix)):  # copied, or it would keep those of its group
                self._fresh[id(prefix)] = [tensor[at : at + 1].clone() for tensor in state]
        for (table, _), tensor in zip(self._tensors[layer], state, strict=True):
            rows = tensor.reshape(group.count, -1).contiguous().view(torch.uint8)
            if group.device_slots is not None:
                kept = rows if group.kept is None else rows.index_select(0, group.kept)
                self.room.by_tier["device"][table].index_copy_(0, group.device_slots, kept)
            if group.host_runs:
                place = self.room.by_tier["host"][table]
                self._transfer.store(
                    [(rows[at : at + count], place[slot : slot + count]) for at, slot, count in group.host_runs]
                )
            if group.disk_runs:
                self._disk.write(table, [(slot, rows[at : at + count]) for at, slot, count in group.disk_runs])

    def close(self) -> None:
        """Release the tables; the arena frees them."""
        self._transfer.close()
        self._disk.close()
        self.room.close()
        self._fresh = {}


def _runs(group: StateGroup) -> list[tuple[int, int]]:
    return [(slot, count) for _, slot, count in group.host_runs or group.disk_runs]


def _seen(rows: torch.Tensor, tensor: StateTensor) -> torch.Tensor:
    """View bytes `[spans, bytes]` as the tensor that they encode."""
    return rows.view(tensor.dtype).view(len(rows), *tensor.dims)
