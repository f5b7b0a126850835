"""Gathers requests that coroutines submit one by one, and hands them to the engine in few calls."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from engine.asking.front import Front
from engine.errors import EngineError
from engine.job import Completion, Job

_QUIET_S = 0.05
"""Seconds without a new request before the engine is called: preparing a sample takes a harness milliseconds, a sweep
seconds.
"""
_LONGEST_S = 2.0


@dataclass(eq=False)
class _Asked:
    jobs: Sequence[Job]
    answer: asyncio.Future[list[Completion]]
    found: dict[int, Completion] = field(default_factory=dict)


class Gathering:
    """Waits until no more requests are arriving, and hands all of them to the engine at once.

    They are then in one sweep, and what their prompts have in common is computed once. Earlier calls may be running
    meanwhile. All coroutines must be of one asyncio loop at a time.
    """

    def __init__(self, engine: Front, *, quiet_s: float = _QUIET_S, longest_s: float = _LONGEST_S) -> None:
        """The wait ends when no request has come for `quiet_s` seconds, and after `longest_s` in any case."""
        self._engine = engine
        self._quiet_s, self._longest_s = quiet_s, longest_s
        self._waiting: list[_Asked] = []
        self._calls: set[asyncio.Task[None]] = set()

    async def ask(self, jobs: Sequence[Job]) -> list[Completion]:
        """The completions of one request's jobs, in their order; raises what the engine raises.

        Those of a request that is cancelled are computed all the same, with the others of its call.
        """
        asked = _Asked(jobs, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        if len(self._waiting) == 1:
            call = asyncio.create_task(self._call())
            self._calls.add(call)  # keeps a reference: the loop itself has only a weak one
            call.add_done_callback(self._calls.discard)
        return await asked.answer

    async def _call(self) -> None:
        batch: list[_Asked] = []
        failure: BaseException = EngineError("the event loop has ended before the engine answered")
        try:
            await self._until_quiet()
            batch, self._waiting = self._waiting, []
            owners = [(asked, at) for asked in batch for at in range(len(asked.jobs))]
            stream: Any = self._engine.astream([asked.jobs[at] for asked, at in owners])
            async with aclosing(stream):
                async for index, completion in stream:
                    asked, at = owners[index]
                    asked.found[at] = completion
                    if len(asked.found) == len(asked.jobs) and not asked.answer.done():
                        asked.answer.set_result([asked.found[each] for each in range(len(asked.jobs))])
        except BaseException as error:
            failure = error if isinstance(error, Exception) else failure
        finally:
            for asked in batch or self._waiting:
                if not asked.answer.done():
                    asked.answer.set_exception(failure)
            if not batch:
                self._waiting = []

    async def _until_quiet(self) -> None:
        loop = asyncio.get_running_loop()
        deadline, count = loop.time() + self._longest_s, 0
        while count < len(self._waiting) and loop.time() < deadline:
            count = len(self._waiting)
            await asyncio.sleep(self._quiet_s)
