"""The way of weights to the device: through slots, layer by layer, ahead of the computation."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from engine.memory import accelerator
from engine.memory.disk.file import BLOCK
from engine.memory.link_wait import LinkWait
from engine.memory.staged import StagedCopies
from engine.planning.limits import GATHER_SLOTS, SLOTS
from engine.weights.binding import Binding, bind, bindings
from engine.weights.encoded.expansion import Expansion
from engine.weights.members.group import Group
from engine.weights.placed_unit import PlacedUnit
from engine.weights.store import WeightStore
from engine.weights.sweep_reader import SweepReader
from engine.weights.token_embedding import TokenEmbedding


@dataclass(eq=False)
class _Slot:
    """Device memory that layers take turns in."""

    index: int
    memory: torch.Tensor
    content: PlacedUnit | None = None
    arrival: Future[Any] | None = None
    in_use: bool = False
    released: Any = None
    """Event of the last computation that reads the slot."""


class WeightStream:
    """Brings each unit of a store to the device when its turn comes.

    Parameters are views: of the device part where they lie there wholly, else of the slot that their unit passes
    through. Resident bytes of a parameter that is cut by the border are copied within the device. A layer that is
    stored encoded is expanded once in a sweep, into device memory that all layers use in turn; its slot is free for the
    next but one from then on, unless experts are expanded from it while the layer is computed. What is on disk is read
    in the order of the sweep, ahead of it as far as `read_ahead_bytes` of staging memory reach.

    In a `group`, this engine's part of a layer is brought to its place in the slot, and then the others'. While one
    layer is computed, the next is gathered and this engine's part of the next but one is brought.
    """

    def __init__(self, store: WeightStore, group: Group | None, *, overlap: bool, read_ahead_bytes: int) -> None:
        self._store = store
        self._model = store.model
        self._device = store.arena.device
        self._overlap = overlap
        self._group = group
        arena, units = store.arena, store.placed
        last = units["embedding"] if store.model.is_tied else units["head"]
        order = [*(units[f"layer.{index}"] for index in range(len(store.model.layers))), last]
        self._by_step = order
        self._streamed = [placed for placed in order if placed.num_streamed]
        size = max((placed.num_slot_bytes for placed in self._streamed), default=0)
        count = min(SLOTS if group is None else GATHER_SLOTS, len(self._streamed))
        self._slots = [_Slot(index, arena.empty(size, "device")) for index in range(count)]
        self._next = {id(a): b for a, b in pairwise([*self._streamed, *self._streamed[:1]])}
        self._reader: SweepReader | None = None
        self._number = {id(placed): number for number, placed in enumerate(self._streamed)}
        if any(placed.split.disk for placed in self._streamed):
            streamed, staging = self._streamed, arena.staging(max(read_ahead_bytes, 2 * BLOCK))
            self._reader = SweepReader(
                arena.io,
                staging,
                [placed.disk_spans for placed in streamed],
                lambda unit: streamed[unit].is_in_place,
                ahead=overlap and len(streamed) > count,  # else they stay in the slots
            )
        self._expansion = Expansion(store, order)
        self._outer = _Slot(-1, arena.empty(units["outer"].num_streamed if "outer" in units else 0, "device"))
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="flexgen-fetch")
        self._copy_stream = accelerator.new_stream(self._device)
        self._gather_stream = None if group is None else accelerator.new_stream(self._device)
        self._num_passed = 0
        """Layers of the sweep at hand that need their slots no more."""
        self._staged = StagedCopies(self._device)
        self.link_wait = LinkWait(self._device)
        self._views: dict[int, list[list[Binding]]] = {}
        """Of a streamed unit, by slot: an odd number of units visits both slots in turn."""
        self._bind()
        self._embedding = TokenEmbedding(store.model, units["embedding"], arena, store.wait_for)

    def _bind(self) -> None:
        state = self._model.state
        for placed in self._store.placed.values():
            if placed.coded:
                bind(self._expansion.bindings(placed))
            elif placed.unit.name == "outer" or (placed.unit.name != "embedding" and not placed.num_streamed):
                bind(bindings(state, placed, self._outer.memory))
            elif placed.unit.name != "embedding":
                self._views[id(placed)] = [bindings(state, placed, slot.memory) for slot in self._slots]
                bind(self._views[id(placed)][0])
        table = self._store.placed["embedding"]
        if table.num_streamed == 0:
            bind(bindings(state, table, self._outer.memory))
        if self._model.is_tied:
            output = self._model.output
            assert output is not None
            memories = [slot.memory for slot in self._slots] if table.num_streamed else [self._outer.memory]
            heads: list[list[Binding]] = [[(output, "weight", bindings(state, table, each)[0][2])] for each in memories]
            bind(heads[0])
            if table.num_streamed:
                self._views[id(table)] = heads

    def look_up_ahead(self, ids: torch.Tensor) -> None:
        """Start looking up the ids that `look_up` will be called with next, while the device computes."""
        if self._overlap:
            self._embedding.look_up_ahead(ids)

    def look_up(self, ids: torch.Tensor) -> None:
        """Prepare the token embedding for `ids` `[sequences, rows]` (on the host): brings just their rows here."""
        self._embedding.look_up(ids)

    def acquire(self, step: int) -> None:
        """Wait until layer `step` (or, behind the last layer, the head) can compute, and start fetching the next."""
        placed = self._by_step[step]
        if step == 0:
            self._num_passed = 0
            if "outer" in self._store.placed:
                self._bring_outer(self._store.placed["outer"])
        self._store.wait_for(placed)
        if not placed.num_streamed:
            if placed.coded:
                self._expansion.expand(placed, self._outer.memory)
            self._num_passed = step + 1
            return
        slot = self._filled(placed)
        if not placed.coded:
            bind(self._views[id(placed)][slot.index])
        self._await_arrival(slot)
        if placed.coded:
            self._expansion.expand(placed, slot.memory)
        if not placed.is_read_late:
            self._free(slot)
            self._prefetch(placed)
            self._prefetch(self._next[id(placed)])
            self._num_passed = step + 1
            return
        slot.in_use = True
        self._prefetch(placed)

    def release(self, step: int) -> None:
        """Tell that layer `step` has computed; its slot may be filled anew."""
        placed = self._by_step[step]
        slot = self._slot_with(placed)
        if slot is None or not placed.is_read_late:
            return
        self._free(slot)
        self._prefetch(placed)
        self._num_passed = step + 1

    def expands_experts(self, step: int) -> bool:
        """Whether experts of layer `step` are expanded some at a time, by whoever computes them."""
        return bool(self._by_step[step].stacks)

    def whole(self, step: int) -> AbstractContextManager[None]:
        """Inside, all experts of layer `step`, which is acquired, are parameters, as stock layers need them.

        Raises `CapacityError` where they are expanded some at a time else, and the device has no room for all.
        """
        placed = self._by_step[step]
        slot = self._slot_with(placed)
        return self._expansion.whole(placed, self._outer.memory if slot is None else slot.memory)

    def release_all(self) -> None:
        """Let all slots be filled anew, after a sweep that ended in an error.

        The other members of a group go on with the sweep, and wait for this one's part of the layers that are left.
        """
        for slot in self._slots:
            if slot.in_use:
                self._free(slot)
        for placed in self._by_step[self._num_passed :] if self._group is not None else ():
            if placed.num_streamed:
                slot = self._filled(placed)
                self._await_arrival(slot)
                self._free(slot)
                self._prefetch(placed)
                self._prefetch(self._next[id(placed)])
        self._num_passed = len(self._by_step)

    def _free(self, slot: _Slot) -> None:
        """Let a slot be filled anew, once the computation asked for until now has read it."""
        slot.in_use = False
        if self._copy_stream is not None:
            slot.released = accelerator.current_stream(self._device).record_event()

    def _prefetch(self, placed: PlacedUnit) -> None:
        """Fetch those that follow a unit, in their order, as far as there are slots that neither it nor they are in."""
        kept, following = [placed], self._next[id(placed)]
        while self._overlap and following is not placed:
            if self._slot_with(following) is None:
                free = (slot for slot in self._slots if not slot.in_use and slot.content not in kept)
                if (slot := next(free, None)) is None:
                    return
                self._fetch(following, slot)
            kept.append(following)
            following = self._next[id(following)]

    def _filled(self, placed: PlacedUnit) -> _Slot:
        """The slot that a unit is in, or is being brought to."""
        slot = self._slot_with(placed)
        if slot is None:
            slot = next(slot for slot in self._slots if not slot.in_use)
            self._fetch(placed, slot)
        return slot

    def _slot_with(self, placed: PlacedUnit) -> _Slot | None:
        return next((slot for slot in self._slots if slot.content is placed), None)

    def _fetch(self, placed: PlacedUnit, slot: _Slot) -> None:
        slot.content = placed
        slot.arrival = self._fetcher.submit(self._fill, placed, slot)

    def _bring_outer(self, outer: PlacedUnit) -> None:
        """Bring what is always needed on the device there, once."""
        if not outer.num_streamed:
            self._store.wait_for(outer)
        elif self._outer.content is None:
            self._fetch(outer, self._outer)
            self._await_arrival(self._outer)

    def _await_arrival(self, slot: _Slot) -> None:
        """Let the computation wait until a slot is filled."""
        assert slot.arrival is not None
        with self.link_wait.waiting():
            arrived = slot.arrival.result()
            if arrived is not None:
                accelerator.current_stream(self._device).wait_event(arrived)

    def _fill(self, placed: PlacedUnit, slot: _Slot) -> Any:
        self._store.wait_for(placed)
        gathers = placed.gathered_bytes > 0
        if self._copy_stream is None:
            self._copy(placed, slot.memory)
            if self._group is not None and gathers:
                self._group.gather(placed, slot.memory)
            return None
        with accelerator.on_device(self._device), accelerator.on_stream(self._copy_stream, self._device):
            if slot.released is not None:
                self._copy_stream.wait_event(slot.released)
            self._copy(placed, slot.memory)
            copied = self._copy_stream.record_event()
        if self._group is None or not gathers:
            return copied
        with accelerator.on_device(self._device), accelerator.on_stream(self._gather_stream, self._device):
            assert self._gather_stream is not None
            self._gather_stream.wait_event(copied)
            self._group.gather(placed, slot.memory)
            return self._gather_stream.record_event()

    def _copy(self, placed: PlacedUnit, target: torch.Tensor) -> None:
        for tier, offset, piece in placed.pieces():
            destination = target[offset : offset + piece.numel()]
            if self._copy_stream is None or tier == "device" or (tier == "host" and self._store.arena.pinned):
                destination.copy_(piece, non_blocking=True)
            else:
                self._staged.copy(piece, destination)
        if not placed.split.disk:
            return
        if id(placed) not in self._number:
            placed.copy_from_disk(self._store.arena.io, target)
            return
        assert self._reader is not None
        for request, blocks in self._reader.take(self._number[id(placed)], self._event):
            for offset, at, size in request.parts:
                blocking = self._copy_stream is None
                target[at : at + size].copy_(blocks[offset : offset + size], non_blocking=not blocking)

    def _event(self) -> Any:
        """An event behind all copies issued so far; None on devices without streams."""
        return None if self._copy_stream is None else accelerator.current_stream(self._device).record_event()

    def close(self) -> None:
        """Stop fetching and let go of the device memory, which the arena frees."""
        self._fetcher.shutdown(wait=True, cancel_futures=True)
        self._embedding.close()
        if self._reader is not None:
            self._reader.close()
        self._reader = None
        self._expansion.close(self._by_step)
        self._outer.memory = torch.empty(0, dtype=torch.uint8)
        self._views.clear()
        self._next.clear()
        for listed in (self._by_step, self._streamed, self._slots):
            listed.clear()
