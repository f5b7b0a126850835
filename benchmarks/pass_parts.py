"""Where the time of an engine's sweeps went: what the threads of its process did, sweep by sweep, seen from outside.

The operating system counts how long each thread has run and has waited for a core; the engine has no code for it. In a
sweep whose thread neither ran nor waited for a core, it waited for the device, or for the interpreter lock held by
another thread of its process, which then ran meanwhile.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from engine.schedule.timing import SweepTiming

_TICKS_S = 1.0 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class _Clock:
    """A thread's times, in seconds."""

    own: float = 0.0
    """Running on a core."""
    queued: float = 0.0
    """Ready, and waiting for a core."""

    def since(self, other: _Clock) -> _Clock:
        return _Clock(self.own - other.own, self.queued - other.queued)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A sweep, and the time since the end of the one before it; seconds."""

    at_s: float
    """When it began, after the first one."""
    idle_s: float
    """From the end of the previous sweep to its beginning: the engine had nothing to do."""
    host_s: float
    """Scheduling and making completions, which `SweepTiming` reports separately."""
    load_s: float
    pass_s: float
    """The pass over the layers, without loading."""
    rows: int
    sequences: int
    engine_s: float
    """Running time of the busiest thread other than the main one: the engine's."""
    engine_queued_s: float
    """Time that this thread waited for a core."""
    main_s: float
    """Running time of the process's main thread: in a worker, it accepts jobs."""
    others_s: float
    """Running time of all other threads."""
    busy_cores: float
    """Mean number of busy cores of the machine."""


class PassParts:
    """Called after each sweep of an engine in the process `pid`; records what has happened since the last one."""

    def __init__(self, pid: Callable[[], int]) -> None:
        """`pid` is called at each sweep, because a process may be replaced."""
        self.parts: list[Part] = []
        self._pid = pid
        self._clocks: dict[int, _Clock] = {}
        self._seen_at, self._busy_s = time.perf_counter(), _busy_s()
        self._first: float | None = None
        self._ended: float | None = None

    def begin(self) -> None:
        """Forget earlier sweeps and start counting."""
        self.parts, self._first, self._ended = [], None, None
        self._look()

    def observe(self, timing: SweepTiming) -> None:
        """Record a sweep."""
        pid, before, busy, at = self._pid(), self._clocks, self._busy_s, self._seen_at
        self._look()
        own = {thread: clock.since(before.get(thread, _Clock())) for thread, clock in self._clocks.items()}
        main = own.pop(pid, _Clock())
        engine = max(own.values(), key=lambda clock: clock.own, default=_Clock())
        self._first = timing.begun if self._first is None else self._first
        self.parts.append(
            Part(
                at_s=timing.begun - self._first,
                idle_s=0.0 if self._ended is None else max(0.0, timing.begun - self._ended),
                host_s=timing.host_s,
                load_s=timing.load_s,
                pass_s=timing.sweep_s - timing.load_s,
                rows=timing.prefill_rows + timing.decode_rows,
                sequences=timing.num_sequences,
                engine_s=engine.own,
                engine_queued_s=engine.queued,
                main_s=main.own,
                others_s=sum(clock.own for clock in own.values()) - engine.own,
                busy_cores=(self._busy_s - busy) / max(1e-9, self._seen_at - at),
            )
        )
        self._ended = timing.begun + timing.host_s + timing.sweep_s

    def _look(self) -> None:
        self._clocks, self._busy_s, self._seen_at = _clocks(self._pid()), _busy_s(), time.perf_counter()


def _clocks(pid: int) -> dict[int, _Clock]:
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            own, queued, _ = (task / "schedstat").read_text().split()
        except (OSError, ValueError):  # it has ended meanwhile
            continue
        found[int(task.name)] = _Clock(int(own) / 1e9, int(queued) / 1e9)
    return found


def _busy_s() -> float:
    """Busy time of all cores together, since the machine was started."""
    first = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, irq, soft = map(int, first[:7])
    return (user + nice + system + irq + soft) * _TICKS_S


_COLUMNS = ("at_s", "idle_s", "host_s", "load_s", "pass_s", "rows", "sequences", "engine_s", "engine_queued_s")
_COLUMNS += ("main_s", "others_s", "busy_cores")


def table(parts: Iterable[Part]) -> str:
    """Format the sweeps as lines, with their sums."""
    lines = ["".join(f"{name.removesuffix('_s').replace('engine_queued', 'queued'):>11}" for name in _COLUMNS)]
    parts = list(parts)
    rows = [[getattr(part, name) for name in _COLUMNS] for part in parts]
    if rows:
        rows.append([sum(column) for column in zip(*rows, strict=True)])
        rows[-1][0], rows[-1][-1] = parts[-1].at_s, rows[-1][-1] / len(parts)
    lines += ["".join(f"{value:11d}" if isinstance(value, int) else f"{value:11.3f}" for value in row) for row in rows]
    return "\n".join(lines)
