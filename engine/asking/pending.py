"""The unfinished jobs of one call, and the queue that brings their completions from the engine to the caller."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from engine.job import Completion

Finished = list[tuple[int, Completion]]
"""The completions of one call that one sweep finished, each with the position of its job."""

Result = Finished | BaseException
"""The completions that a sweep finished, or the exception that ends the call."""


@dataclass(eq=False)
class Call:
    """The serving thread's view of one call."""

    left: dict[int, Any]
    """The unfinished jobs by their position in the call; the serving thread removes those that it has delivered."""
    put: Callable[[Result], None]
    """A callback that takes the next result. It is called in the serving thread, and neither blocks nor raises."""
    entered: Callable[[list[int]], None] | None = None
    """A callback that gets the positions of jobs whose first sweep is about to begin; it neither blocks nor raises."""

    def begin(self, positions: list[int]) -> None:
        """Call `entered`, if it is set, for jobs whose first sweep is about to begin."""
        if self.entered is not None:
            self.entered(positions)


class Pending(Iterator[Finished]):
    """The completions of one call, one list a sweep; closing or deleting the object drops the jobs that have not ended.

    Any thread may close it: a thread that waits for the next result then gets no more.
    """

    def __init__(
        self,
        left: dict[int, Any],
        bad: Finished,
        abandon: Callable[[Call], None],
        entered: Callable[[list[int]], None] | None = None,
    ) -> None:
        """`bad`: completions of jobs that cannot run, which come first; `abandon` drops unfinished jobs."""
        self._results: queue.SimpleQueue[Result] = queue.SimpleQueue()
        self.call = Call(left, self._results.put, entered)
        self._left = len(left)
        self._bad = bad
        self._abandon = abandon
        self._is_closed = False

    def __next__(self) -> Finished:
        """Wait for the completions of the next sweep and return them. Raises the exception that ends the call."""
        if self._bad and not self._is_closed:
            bad, self._bad = self._bad, []
            return bad
        if not self._left or self._is_closed:
            self.close()
            raise StopIteration
        result = self._results.get()
        if isinstance(result, BaseException):
            self.close()
            raise result
        if not result:  # closed meanwhile by another thread
            self._results.put(result)  # others may wait, too
            raise StopIteration
        self._left -= len(result)
        return result

    def close(self) -> None:
        """Drop the jobs that have not ended."""
        if not self._is_closed:
            self._is_closed = True
            self._abandon(self.call)
            self._results.put([])  # otherwise another thread that waits for the next result would wait for ever

    def __del__(self) -> None:
        self.close()


class AsyncPending:
    """The completions of one call for a coroutine, one at a time. It must be created inside a running asyncio loop."""

    def __init__(self, left: dict[int, Any]) -> None:
        self._loop = asyncio.get_running_loop()
        self._results: asyncio.Queue[Result] = asyncio.Queue()
        self.call = Call(left, self._put)
        self._left = len(left)

    def _put(self, item: Result) -> None:
        with suppress(RuntimeError):  # a loop that was closed awaits nothing any more
            self._loop.call_soon_threadsafe(self._results.put_nowait, item)

    async def completions(self) -> AsyncIterator[tuple[int, Completion]]:
        """Yield (position, completion) until none is left; raises the fault that ends the call."""
        while self._left:
            result = await self._results.get()
            if isinstance(result, BaseException):
                raise result
            self._left -= len(result)
            for index, completion in result:
                yield index, completion
