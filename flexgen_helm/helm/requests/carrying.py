"""Stores the engine's answers in HELM's cache, in a thread of its own, even if the caller stops waiting."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType

from flexgen_helm.helm.requests.asked import Answer

_CLOSING_S = 0.1
"""Seconds between calls of `close` until an engine that must end has ended."""


class Carrier:
    """Runs `carry_out`, which stores answers as it yields them, in a thread; iterate over it for what that yields.

    A context manager. If it is left before the end, as by an interrupt, `close` ends the engine after the current
    sweep, whose answers are stored too.
    """

    def __init__(self, carry_out: Callable[[], Iterable[list[Answer]]], close: Callable[[], None]) -> None:
        self._carry_out = carry_out
        self._close = close
        self._inbox: queue.SimpleQueue[list[Answer] | BaseException | None] = queue.SimpleQueue()
        self._is_over = False
        self._thread = threading.Thread(target=self._carry, name="flexgen-sweep", daemon=True)

    def __enter__(self) -> Carrier:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._thread.is_alive():
            if not self._is_over:
                self._close()  # repeatedly, because an engine that is still loading can be closed only later
            self._thread.join(_CLOSING_S)

    def __iter__(self) -> Iterator[list[Answer]]:
        """Raises what `carry_out` raises."""
        while not self._is_over:
            answers = self._inbox.get()
            if isinstance(answers, list):
                yield answers
                continue
            self._is_over = True
            if answers is not None:
                raise answers

    def _carry(self) -> None:
        try:
            for answers in self._carry_out():
                self._inbox.put(answers)
        except BaseException as error:
            self._inbox.put(error)
        else:
            self._inbox.put(None)
