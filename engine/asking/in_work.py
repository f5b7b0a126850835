"""Whose the jobs are that are in work, and who is told what of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from engine.asking.pending import Call, Finished
from engine.job import Completion


class InWork:
    """What of which call is in work, by the identity of whatever stands for a job there."""

    def __init__(self) -> None:
        self._owner: dict[int, tuple[Call, int]] = {}
        """Its call and its position there."""
        self._to_enter: set[int] = set()
        """Of those whose caller wants to know when they are first computed, which have not been yet."""

    def __len__(self) -> int:
        return len(self._owner)

    def __contains__(self, running: object) -> bool:
        return id(running) in self._owner

    def add(self, call: Call, running: Mapping[int, Any]) -> None:
        """Take in what stands for jobs of a call, by their positions there."""
        self._owner.update({id(each): (call, index) for index, each in running.items()})
        if call.entered is not None:
            self._to_enter.update(map(id, running.values()))

    def forget(self, running: object) -> tuple[Call, int]:
        """Have it no longer in work; whose it was."""
        self._to_enter.discard(id(running))
        return self._owner.pop(id(running))

    def calls(self) -> list[Call]:
        """Those of which anything is in work."""
        return list({id(call): call for call, _ in self._owner.values()}.values())

    def tell_entered(self, running: Iterable[object]) -> None:
        """Tell callers who want to know it which of their jobs are about to be computed for the first time."""
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
        """Give callers the completions of what has ended."""
        finished: dict[int, tuple[Call, Finished]] = {}
        for each, completion in done:
            call, index = self.forget(each)
            call.left.pop(index)
            finished.setdefault(id(call), (call, []))[1].append((index, completion))
        for call, results in finished.values():
            call.put(results)
