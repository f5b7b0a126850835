"""Device buffers through which streamed weights pass in turn, and the thread that fills them in advance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from engine.memory import accelerator
from engine.memory.disk.file import BLOCK
from engine.memory.link_wait import LinkWait
from engine.memory.staged import StagedCopies
from engine.planning.limits import GATHER_SLOTS, SLOTS
from engine.weights.members.group import Group
from engine.weights.portion import Portion
from engine.weights.store import WeightStore
from engine.weights.sweep_reader import SweepReader

_AT_ONCE = 64 << 20
"""The bytes of weights in one copy: about a millisecond, for which other copies over the link have to wait."""


@dataclass(eq=False)
class Slot:
    """A device buffer that portions use in turn."""

    index: int
    memory: torch.Tensor
    content: Portion | None = None
    arrival: Future[Any] | None = None
    in_use: bool = False
    released: Any = None
    """The event of the last computation that reads the slot."""


class Slots:
    """A few slots through which portions of weights pass in the order of the sweep, in rotation.

    While one is in use, a thread fetches the portions that follow, as far as there are slots. Portions on disk are read
    further ahead, as far as `read_ahead_bytes` of staging memory reach. In a `group`, this engine's part of a unit is
    copied to its place in the slot, and then the others'.
    """

    def __init__(
        self,
        store: WeightStore,
        group: Group | None,
        portions: Sequence[Portion],
        *,
        overlap: bool,
        read_ahead_bytes: int,
    ) -> None:
        """portions: those that are streamed, in the order of the sweep."""
        self._store, self._group, self._overlap = store, group, overlap
        arena = store.arena
        self._device = arena.device
        size = max((portion.num_slot_bytes for portion in portions), default=0)
        count = min(SLOTS if group is None else GATHER_SLOTS, len(portions))
        self._slots = [Slot(index, arena.empty(size, "device")) for index in range(count)]
        self._next = {id(a): b for a, b in pairwise([*portions, *portions[:1]])}
        self._skipped: set[int] = set()
        """The portions that are not needed in their next turn."""
        self._number = {id(portion): number for number, portion in enumerate(portions)}
        self._reader: SweepReader | None = None
        if any(portion.placed.split.disk for portion in portions):
            listed = [*portions]
            self._reader = SweepReader(
                arena.io,
                arena.staging(max(read_ahead_bytes, 2 * BLOCK)),
                [portion.disk_spans for portion in listed],
                lambda number: listed[number].placed.is_in_place,
                ahead=overlap and len(listed) > count,  # else they stay in the slots
            )
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="flexgen-fetch")
        self._copy_stream = accelerator.new_stream(self._device)
        self._gather_stream = None if group is None else accelerator.new_stream(self._device)
        self._staged = StagedCopies(self._device)
        self.link_wait = LinkWait(self._device)

    @property
    def memories(self) -> list[torch.Tensor]:
        """The memory of all slots, by index."""
        return [slot.memory for slot in self._slots]

    def acquire(self, portion: Portion) -> Slot:
        """The slot of a portion, when it has arrived for the computation; it is not refilled meanwhile."""
        slot = self._filled(portion)
        self.await_arrival(slot)
        slot.in_use = True
        return slot

    def free(self, slot: Slot) -> None:
        """Let a slot be refilled once the computation queued so far has read it."""
        slot.in_use = False
        if self._copy_stream is not None:
            slot.released = accelerator.current_stream(self._device).record_event()

    def free_all(self) -> None:
        """Let all slots be refilled, and fetch all portions in their turn."""
        self._skipped.clear()
        for slot in self._slots:
            if slot.in_use:
                self.free(slot)

    def prefetch(self, portion: Portion) -> None:
        """Fetch the portions that follow one, in order, as far as there are slots that hold neither it nor them."""
        kept, following = [portion], portion
        while self._overlap and (following := self._next[id(following)]) is not portion:
            if id(following) in self._skipped:
                continue
            if self.slot_with(following) is None:
                free = (slot for slot in self._slots if not slot.in_use and slot.content not in kept)
                if (slot := next(free, None)) is None:
                    return
                self.fetch(following, slot)
            kept.append(following)

    def skip(self, portions: Iterable[Portion], *, skipped: bool = True) -> None:
        """Fetch none of these portions ahead of their turn; or do so again."""
        (self._skipped.update if skipped else self._skipped.difference_update)(map(id, portions))

    def prefetch_behind(self, portion: Portion) -> None:
        """Fetch the portions that follow one which is needed no more, into its slot, too."""
        self.prefetch(portion)
        self.prefetch(self._next[id(portion)])

    def slot_with(self, portion: Portion) -> Slot | None:
        """The slot that holds a portion, or is being filled with it."""
        return next((slot for slot in self._slots if slot.content is portion), None)

    def _filled(self, portion: Portion) -> Slot:
        """The slot that holds a portion, or is filled with it from now on."""
        slot = self.slot_with(portion)
        if slot is None:
            free = [slot for slot in self._slots if not slot.in_use]
            slot = min(free, key=lambda slot: slot.content is not None and id(slot.content) not in self._skipped)
            self.fetch(portion, slot)
        return slot

    def fetch(self, portion: Portion, slot: Slot) -> None:
        """Have a portion copied to a slot, which may be outside of these."""
        slot.content = portion
        slot.arrival = self._fetcher.submit(self._fill, portion, slot)

    def await_arrival(self, slot: Slot) -> None:
        """Make the computation wait until a slot is filled."""
        assert slot.arrival is not None
        with self.link_wait.waiting():
            arrived = slot.arrival.result()
            if arrived is not None:
                accelerator.current_stream(self._device).wait_event(arrived)

    def _fill(self, portion: Portion, slot: Slot) -> Any:
        placed = portion.placed
        self._store.wait_for(placed)
        gathers = placed.gathered_bytes > 0
        if self._copy_stream is None:
            self._copy(portion, slot.memory)
            if self._group is not None and gathers:
                self._group.gather(placed, slot.memory)
            return None
        with accelerator.on_device(self._device), accelerator.on_stream(self._copy_stream, self._device):
            if slot.released is not None:
                self._copy_stream.wait_event(slot.released)
            self._copy(portion, slot.memory)
            copied = self._copy_stream.record_event()
        if self._group is None or not gathers:
            return copied
        with accelerator.on_device(self._device), accelerator.on_stream(self._gather_stream, self._device):
            assert self._gather_stream is not None
            self._gather_stream.wait_event(copied)
            self._group.gather(placed, slot.memory)
            return self._gather_stream.record_event()

    def _copy(self, portion: Portion, target: torch.Tensor) -> None:
        for tier, offset, piece in portion.pieces():
            destination = target[offset : offset + piece.numel()]
            if self._copy_stream is None or tier == "device" or (tier == "host" and self._store.arena.pinned):
                for place, part in zip(destination.split(_AT_ONCE), piece.split(_AT_ONCE), strict=True):
                    place.copy_(part, non_blocking=True)
            else:
                self._staged.copy(piece, destination)
        if not portion.placed.split.disk:
            return
        if id(portion) not in self._number:
            portion.copy_from_disk(self._store.arena.io, target)
            return
        assert self._reader is not None
        for request, blocks in self._reader.take(self._number[id(portion)], self._event):
            for offset, at, size in request.parts:
                blocking = self._copy_stream is None
                target[at : at + size].copy_(blocks[offset : offset + size], non_blocking=not blocking)

    def _event(self) -> Any:
        """An event after all copies issued so far; None on devices without streams."""
        return None if self._copy_stream is None else accelerator.current_stream(self._device).record_event()

    def close(self) -> None:
        """Stop fetching and release the device memory, which the arena frees."""
        self._fetcher.shutdown(wait=True, cancel_futures=True)
        if self._reader is not None:
            self._reader.close()
        self._reader = None
        self._next.clear()
        self._slots.clear()
