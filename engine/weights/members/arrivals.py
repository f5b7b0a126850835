"""Tracks which units of weights are complete, whichever process loads them."""

from __future__ import annotations

import time
from collections.abc import Iterator

from engine.errors import EngineError
from engine.memory import accelerator
from engine.memory.arena import Arena
from engine.weights.members.host_weights import HostWeights
from engine.weights.members.placing import shared_tiers
from engine.weights.placed_unit import PlacedUnit

_POLL_S = 0.002
"""How often to check whether another process has loaded a unit."""


class Arrivals:
    """Tracks which units are complete, and which parts of the others this process loads.

    Alone, it loads all of them. Units with shared bytes are loaded by one member, and all wait until they are complete.
    """

    def __init__(self, placed: dict[str, PlacedUnit], arena: Arena, shared: HostWeights | None) -> None:
        self._placed = placed
        self._arena = arena
        self._shared = shared
        self._shared_tiers = shared_tiers(arena.device)
        self._fault: BaseException | None = None
        for each in placed.values() if "device" in self._shared_tiers else ():
            if (memory := self._memory_of(each)) is not None:
                each.parts["device"] = memory.view(each.unit.name)[: each.split.device]

    def _memory_of(self, placed: PlacedUnit) -> HostWeights | None:
        return self._shared if self._shared is not None and placed.unit.name in self._shared else None

    def begin(self, placed: PlacedUnit) -> None:
        """Decide which parts of a unit this process loads, and allocate its shared memory, before loading it."""
        if placed.has_begun:
            return
        placed.has_begun = True
        if (shared := self._memory_of(placed)) is not None:
            is_ours, memory = shared.begin(placed.unit.name), shared.claim(placed.unit.name)
            for tier in self._shared_tiers:
                size = placed.split.device if tier == "device" else placed.split.host
                placed.parts[tier], memory = self._arena.shared(memory[:size], tier), memory[size:]
            if not is_ours:
                placed.bring(placed.brings.difference(self._shared_tiers))
        if not placed.missing:
            self._end(placed)

    def take_over(self, placed: PlacedUnit) -> bool:
        """Whether this process must load a unit's shared bytes because the member that was to load them has ended."""
        if self._shared is None or not self._shared.begin(placed.unit.name, of_others=True):
            return False
        placed.bring(frozenset(self._shared_tiers))
        return True

    def arrive(self, placed: PlacedUnit, name: str) -> None:
        """Note that all of a parameter is in place, as far as this process loads it."""
        placed.missing.discard(name)
        if not placed.missing:
            self._end(placed)

    def _end(self, placed: PlacedUnit) -> None:
        """Note that this process has loaded all it had to load of a unit."""
        if accelerator.has_streams(self._arena.device):
            accelerator.current_stream(self._arena.device).synchronize()  # other streams read the unit
        if (shared := self._memory_of(placed)) is None:
            placed.settle()
        elif placed.brings.intersection(self._shared_tiers):
            shared.finish(placed.unit.name)
            placed.settle()

    def left(self) -> Iterator[PlacedUnit]:
        """The units that are not complete yet; raises the fault that ended loading."""
        for placed in list(self._placed.values()):
            self._look(placed)
            if not placed.is_in_place:
                if self._fault is not None:
                    raise self._fault
                yield placed

    def until_complete(self, name: str | None = None) -> Iterator[list[PlacedUnit]]:
        """Yield the incomplete units (of `name`, or all) every few milliseconds; raises what ended loading."""
        while left := [placed for placed in self.left() if name in (None, placed.unit.name)]:
            yield left
            time.sleep(_POLL_S)

    def _look(self, placed: PlacedUnit) -> None:
        """Check what other members have loaded."""
        if placed.is_in_place or (shared := self._memory_of(placed)) is None:
            return
        if placed.has_begun and not placed.missing and shared.is_complete(placed.unit.name):
            placed.settle()
        elif self._fault is None and (fault := shared.fault) is not None:
            self.give_up(fault)

    def give_up(self, fault: BaseException) -> None:
        """End loading: threads that wait for an incomplete unit get `fault`.

        Other members get `fault` too if it would occur there as well; otherwise they load what this member was to load.
        """
        self._fault = fault
        if self._shared is not None:
            if isinstance(fault, EngineError) and type(fault) is not EngineError:
                self._shared.give_up(fault)
            self._shared.leave()
        for placed in self._placed.values():
            placed.complete.set()

    def wait_for(self, placed: PlacedUnit) -> None:
        """Wait until a unit is complete; raises the fault that ended loading."""
        while not placed.complete.wait(None if self._shared is None else _POLL_S):
            self._look(placed)
        if not placed.is_in_place and self._fault is not None:
            raise self._fault

    def close(self) -> None:
        """Release the shared memory."""
        if self._shared is not None:
            self._shared.close()
