"""Encoded parameters as numbers: those of a layer at once, or of experts some at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from engine.errors import CapacityError
from engine.kernels.grouped.stack import Stack
from engine.kernels.invariant.mode import plain_arithmetic
from engine.model.experts.interface import bind_stack
from engine.model.unit import Unit
from engine.planning.fit import gb
from engine.weights.binding import Binding, binding, stored_bytes
from engine.weights.placed_unit import PlacedUnit
from engine.weights.store import WeightStore
from engine.weights.stored_form import experts_at_once, group_bytes


class Expansion:
    """Device memory in which encoded parameters become numbers: those of a layer before it is computed, in turn.

    Experts may be left out of that. Then the function that computes them has some at a time expanded, as it goes on.
    """

    def __init__(self, store: WeightStore, units: list[PlacedUnit]) -> None:
        self._store, self._model = store, store.model
        arena = store.arena
        self._memory = arena.empty(max((unit.expanded[-1].end for unit in units if unit.expanded), default=0), "device")
        self._group = arena.empty(max((group_bytes(store.model, unit.stacks) for unit in units), default=0), "device")

    @property
    def num_bytes(self) -> int:
        """How many bytes of the device it takes."""
        return self._memory.numel() + self._group.numel()

    def bindings(self, placed: PlacedUnit) -> list[Binding]:
        """The parameters of an encoded unit that are expanded before it is computed."""
        memory = [self._memory[extent.first : extent.end] for extent in placed.expanded]
        return [binding(self._model.state, placed, e, m) for e, m in zip(placed.expanded, memory, strict=True)]

    def expand(self, placed: PlacedUnit, slot: torch.Tensor) -> None:
        """Fill the memory that the unit's parameters are views of, and let experts be taken from their stored bytes."""
        stored = {extent.name: stored_bytes(placed, extent, slot) for extent in placed.extents}
        for place in placed.expanded:
            memory = self._memory[place.first : place.end]
            if place.name in placed.coded:
                self._decode(place.name, stored[place.name], memory.view(self._model.state[place.name].dtype))
            else:
                memory.copy_(stored[place.name])
        for name in placed.stacks:
            like = self._model.state[name]
            take = partial(self._take, name, stored[name])
            bind_stack(*placed.unit.owners[name], Stack(like.shape, like.dtype, experts_at_once(like), take))

    def _take(self, name: str, stored: torch.Tensor, first: int, end: int) -> torch.Tensor:
        like = self._model.state[name]
        values = self._group[: (end - first) * like[0].nbytes].view(like.dtype)
        with plain_arithmetic():  # numbers are what they are
            self._decode(name, stored, values, first * like[0].numel())
        return values.view(end - first, *like.shape[1:])

    def _decode(self, name: str, stored: torch.Tensor, values: torch.Tensor, first_element: int = 0) -> None:
        packed, codec = self._model.packed.get(name), self._store.codec
        if packed is not None:
            packed.decode(stored, values, first_element)
        else:
            assert codec is not None
            codec.decode(stored, values, first_element, self._model.state[name].numel())

    @contextmanager
    def whole(self, placed: PlacedUnit, slot: torch.Tensor) -> Iterator[None]:
        """Inside, experts of a unit are parameters, too, in memory of their own, for functions that need all of them.

        Raises `CapacityError` where the device has no room for them.
        """
        likes = {name: self._model.state[name] for name in placed.stacks}
        values: dict[str, torch.Tensor] = {}
        try:
            for extent in placed.extents:
                if (like := likes.get(extent.name)) is not None:
                    whole = values[extent.name] = torch.empty_like(like, device=self._store.arena.device)
                    self._decode(extent.name, stored_bytes(placed, extent, slot), whole.view(-1))
        except torch.OutOfMemoryError:
            raise CapacityError(
                f"{placed.unit.name}: its experts as numbers take {gb(sum(each.nbytes for each in likes.values()))}, "
                "and the device has less room beside what it holds; raise gpu-memory"
            ) from None
        with Unit(placed.unit.name, {name: placed.unit.owners[name] for name in values}).holding(values):
            yield

    def close(self, units: list[PlacedUnit]) -> None:
        """Let go of the memory, which the arena frees."""
        for unit in units:
            for name in unit.stacks:
                bind_stack(*unit.unit.owners[name], None)
        self._memory = self._group = torch.empty(0, dtype=torch.uint8)
