"""A model's stages as threads of one process, which hand hidden states on through queues."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pytest
import torch

from engine import Engine, Policy
from engine.errors import EngineError
from engine.member import Member
from engine.memory.tiers import Memory

MEMORY = Memory(device=1 << 30, host=4 << 30, disk=1 << 30, shared=True)


@dataclass
class Meeting:
    """Where the stages of a model meet."""

    count: int
    told: list[SimpleQueue[Any]] = field(init=False)
    handed: list[SimpleQueue[Any]] = field(init=False)
    reasons: list[SimpleQueue[Any]] = field(init=False)
    faults: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.told, self.handed, self.reasons = ([SimpleQueue() for _ in range(self.count)] for _ in range(3))

    def take(self, queue: SimpleQueue[Any]) -> Any:
        """What comes next; raises `EngineError` where another stage has failed."""
        while not self.faults:
            try:
                return queue.get(timeout=0.1)
            except Empty:
                continue
        raise EngineError("another stage has failed")


class Line:
    """In place of `engine.stages.line.StageLine`: what is handed on says whose it is, which must be what is due."""

    def __init__(self, meeting: Meeting, member: Member, width: int, dtype: torch.dtype) -> None:
        self.member, self._meeting, self._width, self._dtype = member, meeting, width, dtype
        self._lane, self._sizes, self._num_taken, self._num_handed = 0, [0], 0, 0
        self._waiting: dict[int, torch.Tensor] = {}

    def tell(self, lane: int, numbers: torch.Tensor) -> None:
        for queue in self._meeting.told[1:]:
            queue.put(numbers.clone())

    def hear(self) -> torch.Tensor | None:
        heard: torch.Tensor | None = self._meeting.take(self._meeting.told[self.member.index])
        return heard

    def end(self) -> None:
        for queue in self._meeting.told[1:]:
            queue.put(None)

    def begin(self, lane: int, sizes: Sequence[int]) -> None:
        self._lane, self._sizes, self._num_taken, self._num_handed, self._waiting = lane, [*sizes], 0, 0, {}

    def take(self, number: int) -> torch.Tensor:
        assert number == self._num_taken
        self._num_taken += 1
        lane, given, hidden = self._meeting.take(self._meeting.handed[self.member.stage - 1])
        assert (lane, given, len(hidden)) == (self._lane, number, self._sizes[number])
        taken: torch.Tensor = hidden
        return taken

    def hand_on(self, number: int, hidden: torch.Tensor) -> None:
        assert (hidden.shape[1], hidden.dtype) == (self._width, self._dtype)
        self._waiting[number] = hidden.clone()
        while (due := self._waiting.pop(self._num_handed, None)) is not None:
            self._meeting.handed[self.member.stage].put((self._lane, self._num_handed, due))
            self._num_handed += 1

    def forgo(self) -> None:
        if self.member.stage > 0:
            for number in range(self._num_taken, len(self._sizes)):
                self.take(number)
        for size in self._sizes[self._num_handed :] if not self.member.leads else ():
            self.hand_on(self._num_handed, torch.zeros(size, self._width, dtype=self._dtype))

    def settle(self, reason: str) -> str:
        if self.member.stage > 0:
            reason = self._meeting.take(self._meeting.reasons[self.member.stage - 1]) or reason
        if not self.member.leads:
            self._meeting.reasons[self.member.stage].put(reason)
        return reason

    def close(self) -> None:
        pass


@contextmanager
def staged(model: Path, count: int, **policy: Any) -> Iterator[list[Engine]]:
    """The engines of a model's stages, the one that leads first; the others follow. Raises what fails there."""
    meeting, engines = Meeting(count), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.opening.StageLine", lambda member, _, *sizes: Line(meeting, member, *sizes[:2]))
        for index in range(count):
            member = Member(
                index=index, count=count, gather=False, stages=True, memory=MEMORY, weights=None, meeting="here"
            )
            opened = Policy.load({"device": "cpu", **policy})
            engines.append(Engine.from_pretrained(str(model), opened, member=member))

    def follow(engine: Engine) -> None:
        try:
            engine.follow()
        except BaseException as error:
            meeting.faults.append(error)

    threads = [threading.Thread(target=follow, args=(engine,), daemon=True) for engine in engines[1:]]
    for thread in threads:
        thread.start()
    try:
        yield engines
    finally:
        for engine in engines:
            engine.close()
        for thread in threads:
            thread.join(20)
    assert not meeting.faults
