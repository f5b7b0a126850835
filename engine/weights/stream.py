"""Streams weights to the device: through slots, layer by layer, ahead of the computation."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from engine.memory.link_wait import LinkWait
from engine.weights.binding import Binding, bind, bindings
from engine.weights.encoded.expansion import Expansion
from engine.weights.members.group import Group
from engine.weights.placed_unit import PlacedUnit
from engine.weights.portion import Portion
from engine.weights.slots import Slot, Slots
from engine.weights.store import WeightStore
from engine.weights.token_embedding import TokenEmbedding


class WeightStream:
    """Copies each unit of a store to the device when its turn comes.

    Parameters are views: of the device part where they are there wholly, else of the slot that their unit passes
    through. Resident bytes of a parameter that is cut by the border are copied within the device. A layer that is
    stored encoded is decoded once in a sweep, into device memory that all layers use in turn; its slot is free for the
    next but one from then on, unless experts are decoded from it while the layer is computed. Experts may pass through
    the slots by themselves, some at a time, after the rest of their layer.

    In a `group`, this engine's part of a layer is copied to its place in the slot, and then the others'. While one
    layer is computed, the next is gathered and this engine's part of the next but one is copied.
    """

    def __init__(
        self,
        store: WeightStore,
        group: Group | None,
        *,
        overlap: bool,
        read_ahead_bytes: int,
        experts_apart: bool = False,
    ) -> None:
        """experts_apart: whether experts that are decoded some at a time are also transferred so."""
        self._store = store
        self._model = store.model
        self._overlap = overlap
        self._group = group
        arena, units = store.arena, store.placed
        self._by_step = [units[f"layer.{index}"] for index in store.model.held]
        if store.model.has_head:
            self._by_step.append(units["embedding"] if store.model.is_tied else units["head"])
        self._expansion = Expansion(store, self._by_step, apart=experts_apart)
        self._portions = [Portion.whole(each, self._expansion.ranges_apart(each)) for each in self._by_step]
        """The portion with which each step begins; empty where nothing of it is streamed."""
        streamed = [
            portion
            for first in self._portions
            for portion in (first, *self._expansion.portions(first.placed))
            if portion.num_bytes
        ]
        self._slots = Slots(store, group, streamed, overlap=overlap, read_ahead_bytes=read_ahead_bytes)
        self._outer = Slot(-1, arena.empty(units["outer"].num_streamed if "outer" in units else 0, "device"))
        self._num_passed = 0
        """The number of layers of the current sweep that need their slots no more."""
        self._views: dict[int, list[list[Binding]]] = {}
        """The parameter views of a streamed portion, by slot: an odd number of portions visits both slots in turn."""
        self._bind()
        self._embedding = TokenEmbedding(store.model, units["embedding"], arena, store.wait_for)

    @property
    def link_wait(self) -> LinkWait:
        """How long the computation waits for weights."""
        return self._slots.link_wait

    def _bind(self) -> None:
        state, memories = self._model.state, self._slots.memories
        streamed = {id(portion.placed): portion for portion in self._portions if portion.num_bytes}
        for placed in self._store.placed.values():
            portion = streamed.get(id(placed))
            if placed.coded:
                bind(self._expansion.bindings(placed))
            elif placed.unit.name == "outer" or (placed.unit.name != "embedding" and portion is None):
                bind(bindings(state, Portion.whole(placed), self._outer.memory))
            elif portion is not None and placed.unit.name != "embedding":
                self._views[id(portion)] = [bindings(state, portion, memory) for memory in memories]
                bind(self._views[id(portion)][0])
        table = Portion.whole(self._store.placed["embedding"])
        if not table.num_bytes:
            bind(bindings(state, table, self._outer.memory))
        if self._model.is_tied and self._model.has_head:
            output = self._model.output
            assert output is not None
            places = memories if table.num_bytes else [self._outer.memory]
            heads: list[list[Binding]] = [[(output, "weight", bindings(state, table, each)[0][2])] for each in places]
            bind(heads[0])
            if table.num_bytes:
                self._views[id(self._portions[-1])] = heads

    def look_up_ahead(self, ids: torch.Tensor) -> None:
        """Start looking up the ids of the next `look_up` call, while the device computes."""
        if self._overlap:
            self._embedding.look_up_ahead(ids)

    def look_up(self, ids: torch.Tensor) -> None:
        """Prepare the token embedding for `ids` `[sequences, rows]` (on the host): copies just their rows."""
        self._embedding.look_up(ids)

    def acquire(self, step: int) -> None:
        """Wait until layer `step` of those held here, or the head, can compute; start fetching the next."""
        placed, portion = self._by_step[step], self._portions[step]
        if step == 0:
            self._num_passed = 0
            if "outer" in self._store.placed:
                self._bring_outer(self._store.placed["outer"])
        self._store.wait_for(placed)
        if not portion.num_bytes:
            if placed.coded:
                self._expansion.expand(portion, self._outer.memory, self._slots)
            self._num_passed = step + 1
            return
        slot = self._slots.acquire(portion)
        if placed.coded:
            self._expansion.expand(portion, slot.memory, self._slots)
        else:
            bind(self._views[id(portion)][slot.index])
        if self._is_read_late(placed):
            self._slots.prefetch(portion)
        else:
            self._slots.free(slot)
            self._slots.prefetch_behind(portion)
            self._num_passed = step + 1

    def release(self, step: int) -> None:
        """Note that layer `step` has computed; its slot may be refilled."""
        placed, portion = self._by_step[step], self._portions[step]
        self._slots.skip(self._expansion.portions(placed), skipped=False)
        slot = self._slots.slot_with(portion)
        if slot is None or not self._is_read_late(placed):
            return
        self._slots.free(slot)
        self._slots.prefetch_behind(portion)  # behind the last, what the next sweep begins with
        self._num_passed = step + 1

    def _is_read_late(self, placed: PlacedUnit) -> bool:
        """Whether the slot is read while the unit is computed, not only while it is decoded before."""
        return not placed.coded or (bool(placed.stacks) and not self._expansion.ranges_apart(placed))

    def expands_experts(self, step: int) -> bool:
        """Whether experts of layer `step` are decoded some at a time, by the function that computes them."""
        return bool(self._by_step[step].stacks)

    def whole(self, step: int) -> AbstractContextManager[None]:
        """Inside, all experts of layer `step`, which is acquired, are parameters, as stock layers need them.

        Raises `CapacityError` where they are usually decoded some at a time, and the device has no space for all.
        """
        return self._expansion.whole(self._by_step[step])

    def release_all(self) -> None:
        """Let all slots be refilled, after a sweep that ended in an error.

        The other members of a group go on with the sweep, and wait for this one's part of the remaining layers.
        """
        self._slots.free_all()
        for portion in self._portions[self._num_passed :] if self._group is not None else ():
            if portion.num_bytes:
                self._slots.free(self._slots.acquire(portion))
                self._slots.prefetch_behind(portion)
        self._num_passed = len(self._by_step)

    def _bring_outer(self, outer: PlacedUnit) -> None:
        """Copy the parameters that are always needed to the device, once."""
        if not outer.num_streamed:
            self._store.wait_for(outer)
        elif self._outer.content is None:
            self._slots.fetch(Portion.whole(outer), self._outer)
            self._slots.await_arrival(self._outer)

    def close(self) -> None:
        """Stop fetching and release the device memory, which the arena frees."""
        self._embedding.close()
        self._slots.close()
        self._expansion.close(self._by_step)
        self._outer.memory = torch.empty(0, dtype=torch.uint8)
        self._views.clear()
        self._by_step.clear()
        self._portions.clear()
