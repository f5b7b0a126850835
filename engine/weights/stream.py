"""The way of weights to the device: through slots, layer by layer, ahead of the computation."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from engine.memory import accelerator
from engine.memory.disk.file import BLOCK
from engine.memory.disk.io import wait_for
from engine.memory.layout import Extent
from engine.memory.link_wait import LinkWait
from engine.planning.limits import READ_AHEAD_BYTES
from engine.weights.binding import Binding, bind, parameter_of
from engine.weights.placed_unit import PlacedUnit
from engine.weights.store import WeightStore
from engine.weights.sweep_reader import SweepReader
from engine.weights.token_embedding import TokenEmbedding

NUM_SLOTS = 2
_STAGE_BYTES = 64 << 20


@dataclass(eq=False)
class _Slot:
    """Device memory that layers take turns in."""

    index: int
    memory: torch.Tensor
    content: PlacedUnit | None = None
    arrival: Future[Any] | None = None
    in_use: bool = False
    released: Any = field(default=None)
    """Event of the last computation that reads the slot."""


class WeightStream:
    """Brings each unit of a store to the device when its turn comes.

    Parameters are views: of the device part where they lie there wholly, else of the slot that their unit passes
    through. Resident bytes of a parameter that is cut by the border are copied within the device. A layer that is
    stored encoded is expanded once in a sweep, into device memory that all layers use in turn; its slot is free for the
    next but one from then on. What is on disk is read in the order of the sweep, ahead of it as far as
    `read_ahead_bytes` of staging memory reach.
    """

    def __init__(self, store: WeightStore, *, overlap: bool = True, read_ahead_bytes: int = READ_AHEAD_BYTES) -> None:
        self._store = store
        self._model = store.model
        self._device = store.arena.device
        self._overlap = overlap
        arena, units = store.arena, store.placed
        last = units["embedding"] if store.model.is_tied else units["head"]
        order = [*(units[f"layer.{index}"] for index in range(len(store.model.layers))), last]
        self._by_step = order
        self._streamed = [placed for placed in order if placed.num_streamed]
        size = max((placed.num_streamed for placed in self._streamed), default=0)
        count = min(NUM_SLOTS, len(self._streamed))
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
                lambda unit: streamed[unit].complete.is_set() and not streamed[unit].missing,
                ahead=overlap and len(streamed) > NUM_SLOTS,  # else they stay in the slots
            )
        self._expanded = arena.empty(max((p.expanded[-1].end for p in order if p.coded), default=0), "device")
        self._outer = _Slot(-1, arena.empty(units["outer"].num_streamed if "outer" in units else 0, "device"))
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="flexgen-fetch")
        self._copy_stream = accelerator.new_stream(self._device)
        self.link_wait = LinkWait(self._device)
        self._stage: list[tuple[torch.Tensor, Any]] = []
        self._views: dict[int, list[list[Binding]]] = {}
        """Of a streamed unit, by slot: an odd number of units visits both slots in turn."""
        self._bind()
        self._embedding = TokenEmbedding(store.model, units["embedding"], arena, store.wait_for)

    def _bind(self) -> None:
        for placed in self._store.placed.values():
            if placed.coded:
                memory = [self._expanded[extent.first : extent.end] for extent in placed.expanded]
                bind([self._binding(placed, e, m) for e, m in zip(placed.expanded, memory, strict=True)])
            elif placed.unit.name == "outer" or (placed.unit.name != "embedding" and not placed.num_streamed):
                bind(self._bindings(placed, self._outer.memory))
            elif placed.unit.name != "embedding":
                self._views[id(placed)] = [self._bindings(placed, slot.memory) for slot in self._slots]
                bind(self._views[id(placed)][0])
        table = self._store.placed["embedding"]
        if table.num_streamed == 0:
            bind(self._bindings(table, self._outer.memory))
        if self._model.is_tied:
            output = self._model.output
            assert output is not None
            memories = [slot.memory for slot in self._slots] if table.num_streamed else [self._outer.memory]
            heads: list[list[Binding]] = [
                [(output, "weight", parameter_of(self._view(table, table.extents[0], memory)))] for memory in memories
            ]
            bind(heads[0])
            if table.num_streamed:
                self._views[id(table)] = heads

    def _bindings(self, placed: PlacedUnit, slot: torch.Tensor) -> list[Binding]:
        return [self._binding(placed, extent, self._bytes(placed, extent, slot)) for extent in placed.extents]

    def _binding(self, placed: PlacedUnit, extent: Extent, memory: torch.Tensor) -> Binding:
        like = self._model.state[extent.name]
        return (*placed.unit.owners[extent.name], parameter_of(memory.view(like.dtype).view(like.shape)))

    def _view(self, placed: PlacedUnit, extent: Extent, slot: torch.Tensor) -> torch.Tensor:
        like = self._model.state[extent.name]
        return self._bytes(placed, extent, slot).view(like.dtype).view(like.shape)

    @staticmethod
    def _bytes(placed: PlacedUnit, extent: Extent, slot: torch.Tensor) -> torch.Tensor:
        """A parameter's stored bytes on the device."""
        if extent.end <= placed.split.device:
            return placed.parts["device"][extent.first : extent.end]
        return slot[extent.first - placed.start : extent.end - placed.start]

    def _expand(self, placed: PlacedUnit, slot: torch.Tensor) -> None:
        """Fill the memory that the unit's parameters are views of."""
        for extent, place in zip(placed.extents, placed.expanded, strict=True):
            stored, memory = self._bytes(placed, extent, slot), self._expanded[place.first : place.end]
            if extent.name in placed.coded:
                codec = self._model.packed.get(extent.name) or self._store.codec
                assert codec is not None
                codec.decode(stored, memory.view(self._model.state[extent.name].dtype))
            else:
                memory.copy_(stored)

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
        if step == 0 and "outer" in self._store.placed:
            self._bring_outer(self._store.placed["outer"])
        self._store.wait_for(placed)
        if not placed.num_streamed:
            if placed.coded:
                self._expand(placed, self._outer.memory)
            return
        slot = self._slot_with(placed)
        if slot is None:
            slot = next(slot for slot in self._slots if not slot.in_use)
            self._fetch(placed, slot)
        if not placed.coded:
            bind(self._views[id(placed)][slot.index])
        self._await_arrival(slot)
        if placed.coded:
            self._expand(placed, slot.memory)
            self._free(slot)
            self._prefetch(placed)
            self._prefetch(self._next[id(placed)])
            return
        slot.in_use = True
        self._prefetch(placed)

    def release(self, step: int) -> None:
        """Tell that layer `step` has computed; its slot may be filled anew."""
        placed = self._by_step[step]
        slot = self._slot_with(placed)
        if slot is None or placed.coded:
            return
        self._free(slot)
        self._prefetch(placed)

    def release_all(self) -> None:
        """Let all slots be filled anew, after a sweep that ended in an error."""
        for slot in self._slots:
            if slot.in_use:
                self._free(slot)

    def _free(self, slot: _Slot) -> None:
        """Let a slot be filled anew, once the computation asked for until now has read it."""
        slot.in_use = False
        if self._copy_stream is not None:
            slot.released = accelerator.current_stream(self._device).record_event()

    def _prefetch(self, placed: PlacedUnit) -> None:
        following = self._next[id(placed)]
        if not self._overlap or self._slot_with(following) is not None:
            return
        slot = next((slot for slot in self._slots if not slot.in_use and slot.content is not placed), None)
        if slot is not None:
            self._fetch(following, slot)

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
        if self._copy_stream is None:
            self._copy(placed, slot.memory)
            return None
        with accelerator.on_device(self._device), accelerator.on_stream(self._copy_stream, self._device):
            if slot.released is not None:
                self._copy_stream.wait_event(slot.released)
            self._copy(placed, slot.memory)
            return self._copy_stream.record_event()

    def _copy(self, placed: PlacedUnit, target: torch.Tensor) -> None:
        for tier, offset, piece in placed.pieces():
            destination = target[offset : offset + piece.numel()]
            if self._copy_stream is None or tier == "device" or (tier == "host" and self._store.arena.pinned):
                destination.copy_(piece, non_blocking=True)
            else:
                self._copy_staged(piece, destination)
        if not placed.split.disk:
            return
        if id(placed) not in self._number:
            self._copy_from_disk(placed, target)
            return
        assert self._reader is not None
        for request, blocks in self._reader.take(self._number[id(placed)], self._event):
            for offset, at, size in request.parts:
                blocking = self._copy_stream is None
                target[at : at + size].copy_(blocks[offset : offset + size], non_blocking=not blocking)

    def _copy_from_disk(self, placed: PlacedUnit, target: torch.Tensor) -> None:
        """Bring a unit that does not pass through a slot to the device, once and for all."""
        memory = torch.empty(placed.num_streamed, dtype=torch.uint8)
        spans = placed.disk_spans()
        wait_for(self._store.arena.io.read(spans, memory))
        for span in spans:
            size = span.end - span.first
            target[span.at : span.at + size].copy_(memory[span.at : span.at + size])

    def _event(self) -> Any:
        """An event behind all copies issued so far; None on devices without streams."""
        return None if self._copy_stream is None else accelerator.current_stream(self._device).record_event()

    def _copy_staged(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy pageable or mapped bytes to the device through two page-locked buffers in turn."""
        if not self._stage:
            self._stage = [(accelerator.page_locked(_STAGE_BYTES, dtype=torch.uint8), None) for _ in range(2)]
        for turn, first in enumerate(range(0, source.numel(), _STAGE_BYTES)):
            buffer, copied = self._stage[turn % 2]
            if copied is not None:
                copied.synchronize()
            size = min(_STAGE_BYTES, source.numel() - first)
            buffer[:size].copy_(source[first : first + size])
            target[first : first + size].copy_(buffer[:size], non_blocking=True)
            event = accelerator.current_stream(self._device).record_event()
            self._stage[turn % 2] = buffer, event

    def close(self) -> None:
        """Stop fetching and let go of the device memory, which the arena frees."""
        self._fetcher.shutdown(wait=True, cancel_futures=True)
        self._embedding.close()
        if self._reader is not None:
            self._reader.close()
        self._reader = None
        self._expanded = self._outer.memory = torch.empty(0, dtype=torch.uint8)
        self._views.clear()
        self._next.clear()
        for listed in (self._by_step, self._streamed, self._slots, self._stage):
            listed.clear()
