"""Decodes encoded parameters: those of a layer at once, or of experts some at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from engine.errors import CapacityError
from engine.kernels.grouped.stack import Stack
from engine.kernels.invariant.mode import plain_arithmetic
from engine.memory.layout import Extent, align
from engine.model.experts.interface import bind_stack, stack_of
from engine.model.unit import Unit
from engine.planning.fit import gb
from engine.weights.binding import Binding, binding, stored_bytes
from engine.weights.placed_unit import PlacedUnit
from engine.weights.portion import Portion
from engine.weights.slots import Slots
from engine.weights.store import WeightStore
from engine.weights.stored_form import experts_at_once, group_bytes


class Expansion:
    """Device memory for decoded parameters: those of one layer after another, before each is computed.

    Experts may be left out. Then the function that computes them has some at a time decoded: from the slot that their
    layer is in, or from slots to which these experts are transferred separately.
    """

    def __init__(self, store: WeightStore, units: list[PlacedUnit], *, apart: bool) -> None:
        self._store, self._model = store, store.model
        arena = store.arena
        self._memory = arena.empty(max((unit.expanded[-1].end for unit in units if unit.expanded), default=0), "device")
        self._group = arena.empty(max((group_bytes(store.model, unit.stacks) for unit in units), default=0), "device")
        self._apart: dict[str, list[Portion]] = {}
        """The groups of experts that are transferred separately, by the parameter's name."""
        for unit in units if apart else ():
            for extent in unit.extents:
                if extent.name in unit.stacks and extent.end > unit.start:
                    self._apart[extent.name] = self._groups(unit, extent)

    def _groups(self, placed: PlacedUnit, extent: Extent) -> list[Portion]:
        """The experts of a parameter, in groups that are decoded at once."""
        like = self._model.state[extent.name]
        most = experts_at_once(like)
        counts = [(first, min(len(like), first + most) - first) for first in range(0, len(like), most)]
        each = like[0].numel()
        return [Portion(placed, self._ranges(extent, first * each, count * each)) for first, count in counts]

    def _ranges(self, extent: Extent, first_element: int, num_elements: int) -> list[tuple[int, int]]:
        """The ranges, in their unit, of the stored bytes of consecutive numbers of an encoded parameter."""
        like, packed, codec = self._model.state[extent.name], self._model.packed.get(extent.name), self._store.codec
        if packed is not None:
            found = packed.ranges(first_element, num_elements)
        else:
            assert codec is not None
            found = codec.weight_ranges(like, first_element, num_elements)
        return [(extent.first + first, extent.first + end) for first, end in found]

    @property
    def num_bytes(self) -> int:
        """The number of bytes on the device."""
        return self._memory.numel() + self._group.numel()

    def ranges_apart(self, placed: PlacedUnit) -> list[tuple[int, int]]:
        """The ranges, in a unit, of experts that are transferred separately, in order."""
        return [(extent.first, align(extent.end)) for extent in placed.extents if extent.name in self._apart]

    def portions(self, placed: PlacedUnit) -> list[Portion]:
        """The experts of a unit that are transferred separately, in the order in which they are used."""
        return [portion for extent in placed.extents for portion in self._apart.get(extent.name, ())]

    def bindings(self, placed: PlacedUnit) -> list[Binding]:
        """The parameters of an encoded unit that are decoded before it is computed."""
        memory = [self._memory[extent.first : extent.end] for extent in placed.expanded]
        return [binding(self._model.state, placed, e, m) for e, m in zip(placed.expanded, memory, strict=True)]

    def expand(self, portion: Portion, slot: torch.Tensor, slots: Slots) -> None:
        """Decode the unit's parameters, and make the experts' matrices available from their stored bytes.

        portion: the part of the unit that is in `slot`; `slots`: those to which experts are transferred separately.
        """
        placed = portion.placed
        extents = {extent.name: extent for extent in placed.extents}
        for place in placed.expanded:
            memory, extent = self._memory[place.first : place.end], extents[place.name]
            if place.name in placed.coded:
                self._decode(extent, portion, slot, memory.view(self._model.state[place.name].dtype))
            else:
                memory.copy_(stored_bytes(portion, slot, extent.first, extent.end))
        for name in placed.stacks:
            like = self._model.state[name]
            take = partial(self._take, extents[name], portion, slot, slots)
            expect = partial(self._expect, name, slots) if name in self._apart else None
            bind_stack(*placed.unit.owners[name], Stack(like.shape, like.dtype, experts_at_once(like), take, expect))

    def _take(
        self, extent: Extent, portion: Portion, memory: torch.Tensor, slots: Slots, first: int, end: int
    ) -> torch.Tensor:
        """The decoded matrices of some experts, valid until the next call."""
        like = self._model.state[extent.name]
        values = self._group[: (end - first) * like[0].nbytes].view(like.dtype)
        slot = None
        if extent.name in self._apart:
            portion = self._apart[extent.name][first // experts_at_once(like)]
            slot = slots.acquire(portion)
            memory = slot.memory
        with plain_arithmetic():  # numbers are what they are
            self._decode(extent, portion, memory, values, first * like[0].numel())
        if slot is not None:
            slots.free(slot)
            slots.prefetch_behind(portion)
        return values.view(end - first, *like.shape[1:])

    def _expect(self, name: str, slots: Slots, groups: list[tuple[int, int]]) -> None:
        """Skip the experts that are transferred separately, except some groups, until their layer is computed."""
        most = experts_at_once(self._model.state[name])
        taken = {first // most for first, _ in groups}
        for number, portion in enumerate(self._apart[name]):
            slots.skip([portion], skipped=number not in taken)

    def _decode(
        self, extent: Extent, portion: Portion, slot: torch.Tensor, values: torch.Tensor, first_element: int = 0
    ) -> None:
        """Decode an encoded parameter, from `first_element` on, into flat `values`."""
        ranges = self._ranges(extent, first_element, values.numel())
        parts = [stored_bytes(portion, slot, first, end) for first, end in ranges]
        codec = self._model.packed.get(extent.name) or self._store.codec
        assert codec is not None
        codec.decode_parts(parts, values)

    @contextmanager
    def whole(self, placed: PlacedUnit) -> Iterator[None]:
        """Inside, the experts of a unit are parameters, too, in memory of their own, for functions that need them all.

        Raises `CapacityError` where the device has no space for them.
        """
        likes = {name: self._model.state[name] for name in placed.stacks}
        try:
            values = {name: torch.empty_like(like, device=self._store.arena.device) for name, like in likes.items()}
        except torch.OutOfMemoryError:
            raise CapacityError(
                f"{placed.unit.name}: its experts as numbers take {gb(sum(each.nbytes for each in likes.values()))}, "
                "and the device has less free memory; raise gpu-memory"
            ) from None
        for name, numbers in values.items():
            stack = stack_of(*placed.unit.owners[name])
            for first, end in stack.groups():
                numbers[first:end].copy_(stack.take(first, end))
        with Unit(placed.unit.name, {name: placed.unit.owners[name] for name in values}).holding(values):
            yield

    def close(self, units: list[PlacedUnit]) -> None:
        """Release the memory, which the arena frees."""
        for unit in units:
            for name in unit.stacks:
                bind_stack(*unit.unit.owners[name], None)
        self._memory = self._group = torch.empty(0, dtype=torch.uint8)
