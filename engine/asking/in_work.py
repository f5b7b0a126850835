"""Maps the jobs in progress to the calls that they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from engine.asking.pending import Call, Finished
from engine.job import Completion


class InWork:
    """The jobs in progress, by `id()` of the object that represents a job in the engine."""

    def __init__(self) -> None:
        self._owner: dict[int, tuple[Call, int]] = {}
        """The call of each job, and the job's position in the call."""
        self._to_enter: set[int] = set()
        """Jobs not yet computed whose caller is to be told when they are."""

    def __len__(self) -> int:
        return len(self._owner)

    def __contains__(self, running: object) -> bool:
        return id(running) in self._owner

    def add(self, call: Call, running: Mapping[int, Any]) -> None:
        """Add the objects that represent jobs of a call, by the jobs' positions in the call."""
        self._owner.update({id(each): (call, index) for index, each in running.items()})
        if call.entered is not None:
            self._to_enter.update(map(id, running.values()))

    def forget(self, running: object) -> tuple[Call, int]:
        """Remove a job that is no longer in progress; returns its call and position."""
        self._to_enter.discard(id(running))
        return self._owner.pop(id(running))

    def calls(self) -> list[Call]:
        """The calls with jobs in progress."""
        return list({id(call): call for call, _ in self._owner.values()}.values())

    def tell_entered(self, running: Iterable[object]) -> None:
        """Tell callers which of their jobs are about to be computed for the first time, if they asked for that."""
        if not self._to_enter:
            return
        new: dict[int, tuple[Call, list[int]]] = {}
        for each in running:
            if id(each) in self._to_enter:
                self._to_enter.discard(id(each))
                call, index = self._owner[id(each)]
                new.setdefault(id(call), (call, []))[1].append(index)
        for call, indices in new.values():
            assert call.entered is not None
            call.entered(indices)

    def deliver(self, done: Iterable[tuple[object, Completion]]) -> None:
        """Deliver the completions of jobs that have ended to their callers."""
        finished: dict[int, tuple[Call, Finished]] = {}
        for each, completion in done:
            call, index = self.forget(each)
            call.left.pop(index)
            finished.setdefault(id(call), (call, []))[1].append((index, completion))
        for call, results in finished.values():
            call.put(results)
