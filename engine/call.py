"""A call of the engine: the jobs of it that have not ended, and where their completions go."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from engine.job import Completion
from engine.schedule.sequence import Sequence

Finished = list[tuple[int, Completion]]
"""What one sweep finished of a call: positions of jobs and their completions."""

Result = Finished | BaseException
"""What a sweep finished, or the fault that ends the call."""


class Results(Protocol):
    """Where results go, from the engine's thread; `queue.SimpleQueue` is one."""

    def put(self, item: Result, /) -> None:
        """Take the next result; must neither wait nor fail."""


class LoopResults:
    """Results that a coroutine awaits; to be made in a running asyncio loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Result] = asyncio.Queue()

    def put(self, item: Result, /) -> None:
        """Hand `item` to the loop."""
        with suppress(RuntimeError):  # a loop that was closed awaits nothing any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def get(self) -> Result:
        """The next result, in the order of `put`."""
        return await self._queue.get()


@dataclass(eq=False)
class Call:
    """One call of `stream`."""

    results: Results
    sequences: dict[int, Sequence] = field(default_factory=dict)
    """What has not ended, by its position among the jobs."""
