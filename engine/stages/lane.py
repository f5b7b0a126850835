"""Sequences of which a sweep is computed at a time, and what layers keep of them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from engine.cache.key_value import KVCache
from engine.cache.state import StateCache
from engine.memory import accelerator
from engine.memory.tiers import TIERS
from engine.planning.limits import Limits
from engine.schedule.cache_room import CacheRoom
from engine.schedule.scheduler import Scheduler
from engine.schedule.segment import Segment
from engine.stages.in_step import LostSweepError
from engine.stages.line import StageLine
from engine.stages.told import Told
from engine.weights.members.group import Group
from engine.weights.members.lockstep import Lockstep


class Computes(Protocol):
    """What takes a sweep's micro-batches through the layers."""

    limits: Limits

    def sweep(self, batches: list[list[Segment]]) -> list[Any]:
        """The answers of a sweep."""

    def recover(self) -> None:
        """Be ready for another sweep after one that ended in an error."""


Executor = TypeVar("Executor", bound=Computes)


@dataclass(frozen=True, kw_only=True)
class Lane(Generic[Executor]):
    """One of the sweeps that are in flight at the same time; there is one, but where the model is in stages."""

    number: int
    line: StageLine | None
    """To the other stages, where the model's layers are here in part."""
    cache: KVCache
    states: StateCache
    room: CacheRoom
    """Where spans have their keys, values and states."""
    scheduler: Scheduler
    executor: Executor

    def in_step_with(self, group: Group | None) -> Lockstep[list[Segment], Any]:
        """Computes sweeps of this lane together with a group of engines, if there is one."""
        return Lockstep(lambda batches: self.executor.sweep(batches), self.executor.recover, group)

    def tell(self, batches: list[list[Segment]]) -> None:
        """Tell the other stages, if there are any, of the next sweep."""
        if self.line is not None:
            rows, slots = (tuple(map(each.room.num_rows, TIERS)) for each in (self.cache, self.states))
            told = Told.of(self.number, rows, slots, self.scheduler.limits, batches)
            self.line.tell(self.number, told.numbers())

    def has_lost(self, error: Exception) -> bool:
        """Whether a sweep that ended with this error may be computed again, in smaller parts."""
        return accelerator.is_out_of_memory(error) if self.line is None else isinstance(error, LostSweepError)

    def follow(self, told: Told) -> None:
        """Compute what the stage that leads has told, with its rows of keys, values and states.

        A sweep that runs out of memory, here or before, is lost: the stage that leads decides what follows.
        """
        for tables, sizes in ((self.cache.room, told.rows), (self.states.room, told.slots)):
            for tier, size in zip(TIERS, sizes, strict=True):
                tables.be(tier, size)
        self.executor.limits = told.within(self.executor.limits)
        with suppress(LostSweepError):
            self.executor.sweep(told.batches)
