"""When units of weights are complete, whoever puts them in place."""

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
"""How often is looked whether another process has put a unit in place."""


class Arrivals:
    """Knows which units are in place, and what of the others this process brings.

    Alone, all of them. Of units with shared bytes those are brought by one member, and all wait until they are there.
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
        """Decide what this process brings of a unit, and claim its place in shared memory; done before it is put."""
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
        """Whether the shared bytes of a unit that another member was to put are this process's to put, after all."""
        if self._shared is None or not self._shared.begin(placed.unit.name, of_others=True):
            return False
        placed.bring(frozenset(self._shared_tiers))
        return True

    def arrive(self, placed: PlacedUnit, name: str) -> None:
        """Tell that all of a parameter is in place, as far as this process brings it."""
        placed.missing.discard(name)
        if not placed.missing:
            self._end(placed)

    def _end(self, placed: PlacedUnit) -> None:
        """All that this process brings of a unit is in place."""
        if accelerator.has_streams(self._arena.device):
            accelerator.current_stream(self._arena.device).synchronize()  # other streams read it
        if (shared := self._memory_of(placed)) is None:
            placed.settle()
        elif placed.brings.intersection(self._shared_tiers):
            shared.finish(placed.unit.name)
            placed.settle()

    def left(self) -> Iterator[PlacedUnit]:
        """Units that are not complete yet; raises the fault that ended loading."""
        for placed in list(self._placed.values()):
            self._look(placed)
            if not placed.is_in_place:
                if self._fault is not None:
                    raise self._fault
                yield placed

    def until_complete(self, name: str | None = None) -> Iterator[list[PlacedUnit]]:
        """What is not complete of unit `name`, or of all, every few milliseconds, until it is; raises as `left`."""
        while left := [placed for placed in self.left() if name in (None, placed.unit.name)]:
            yield left
            time.sleep(_POLL_S)

    def _look(self, placed: PlacedUnit) -> None:
        """Find out what other members have done."""
        if placed.is_in_place or (shared := self._memory_of(placed)) is None:
            return
        if placed.has_begun and not placed.missing and shared.is_complete(placed.unit.name):
            placed.settle()
        elif self._fault is None and (fault := shared.fault) is not None:
            self.give_up(fault)

    def give_up(self, fault: BaseException) -> None:
        """End loading: threads that wait for an incomplete unit get `fault`.

        Other members are told what they would meet, too. Else they put what this one was to put.
        """
        self._fault = fault
        if self._shared is not None:
            if isinstance(fault, EngineError) and type(fault) is not EngineError:
                self._shared.give_up(fault)
            self._shared.leave()
        for placed in self._placed.values():
            placed.complete.set()

    def wait_for(self, placed: PlacedUnit) -> None:
        """Return when a unit is complete; raises the fault that ended loading."""
        while not placed.complete.wait(None if self._shared is None else _POLL_S):
            self._look(placed)
        if not placed.is_in_place and self._fault is not None:
            raise self._fault

    def close(self) -> None:
        """Let go of what is shared."""
        if self._shared is not None:
            self._shared.close()
