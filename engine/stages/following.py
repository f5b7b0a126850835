"""A stage that does not lead: it computes the sweeps that the leading stage schedules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from engine.errors import EngineError
from engine.stages.line import StageLine
from engine.stages.told import Told
from engine.weights.members.loader import Loader


class Follows(Protocol):
    """The part of a lane's interface that a following stage uses."""

    def follow(self, told: Told) -> None:
        """Compute a sweep."""


class Following:
    """Computes the sweeps that the leading stage schedules, in place of that stage's `SweepLoop`."""

    def __init__(self, line: StageLine, lanes: Sequence[Follows], loader: Loader, check: Callable[[], None]) -> None:
        """loader: loads the weights. check: called after each sweep; raises if the weight files have changed."""
        self._line, self._lanes, self._loader, self._check = line, lanes, loader, check
        self._has_ended = threading.Event()
        self._has_begun = False
        self._is_open = True

    def run(self) -> None:
        """Compute sweeps until the leading stage ends; raises the error of a sweep."""
        self._has_begun = True
        try:
            while (numbers := self._line.hear()) is not None:
                told = Told.read(numbers)
                self._lanes[told.lane].follow(told)
                self._check()
        finally:
            self._has_ended.set()

    def submit(self, call: Any) -> None:
        """Raise `EngineError`: calls go to the leading stage."""
        raise EngineError("this process has some of the model's layers; ask the stage that has the last ones")

    def abandon(self, call: Any) -> None:
        """Do nothing: there are no calls here."""

    @contextmanager
    def lend(self) -> Iterator[Any]:
        """Raise `EngineError`: no other thread may compute here."""
        self.submit(None)
        yield

    def close(self) -> bool:
        """Return when the leading stage has ended or died; False if this was called before."""
        is_first, self._is_open = self._is_open, False
        if is_first:
            if self._has_begun:
                self._has_ended.wait()
            self._loader.close()
        return is_first
