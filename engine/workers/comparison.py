"""A comparison with stock layers, made by one of an engine's processes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from engine.errors import EngineError
from engine.job import Completion, Job
from engine.workers.messages import Compare, Compared, Stage
from engine.workers.place import Place

if TYPE_CHECKING:
    from engine.verification.layerwise import Findings


class Comparison:
    """The state of the comparison in progress, if there is one."""

    def __init__(self) -> None:
        self.alone = threading.Lock()
        """Held by the caller of a comparison."""
        self.place: Place | None = None
        """The place of the process that computes it."""
        self._told: queue.SimpleQueue[Stage | Compared | BaseException] = queue.SimpleQueue()

    def begin(self, place: Place, jobs: Sequence[Job], completions: Sequence[Completion]) -> None:
        """Send the comparison to the process at `place`, which has opened the model."""
        self.place, self._told = place, queue.SimpleQueue()
        place.send(Compare(jobs=tuple(jobs), completions=tuple(completions)))

    def tell(self, told: Stage | Compared) -> None:
        """Handle a message of the process."""
        if self.place is not None:
            self._told.put(told)

    def died(self, place: Place, reason: str) -> None:
        """Note that a process has ended."""
        if place is self.place:
            self._told.put(EngineError(f"the engine's process ended while it compared layers: {reason}"))

    def outcome(self, progress: Callable[[int, int], None]) -> Findings:
        """Wait for the findings; raises what the process raised, or `EngineError` when it dies."""
        while isinstance(told := self._told.get(), Stage):  # closing the engine ends a comparison in progress
            progress(told.done, told.total)
        self.place = None
        found = told.outcome if isinstance(told, Compared) else told
        if isinstance(found, BaseException):
            raise found
        return found
