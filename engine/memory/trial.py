"""Finds out how much memory a machine has: a process allocates it, piece by piece, and frees it. Imports no torch.

Some virtual machines get memory only as it is needed, and report no more than that. The process that tries is the first
that the system ends when memory runs out, and it stops before that where memory does not grow.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from engine.memory.control_groups import ROOT, group_directories, read_fields, read_number
from engine.memory.cores import usable_cores

_STEP, _LARGE_STEP = 64 << 20, 512 << 20
_FAR = 4 << 30
"""Available memory above which large steps are taken."""
_SWAPPED = 256 << 20
"""The most swap that may come into use meanwhile: beyond it, other processes would be swapped out."""
_LEAST_RATE = 0.25e9
"""The least rate in bytes per second; a slower machine is not waited for."""
_START_S = 30


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The system's memory figures, in bytes."""

    total: int
    available: int
    free_swap: int


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The result of a trial."""

    taken: int
    """The most bytes that were allocated at once."""
    total: int
    """The total bytes of memory that the system reported then."""


def look(root: Path = ROOT) -> Seen:
    """Read the system's memory figures; `root` contains its file tree."""
    facts = read_fields(root / "proc/meminfo")
    total, available, swap = (1024 * facts.get(name, 0) for name in ("MemTotal:", "MemAvailable:", "SwapFree:"))
    return Seen(total=total, available=available, free_swap=swap)


def try_memory(most: int) -> Trial | None:
    """Allocate up to `most` bytes while memory grows, and free them, in at most four seconds per GB.

    None where it is impossible or unsafe: in control groups whose processes the system ends all together.
    """
    if any(read_number(directory / "memory.oom.group") == 1 for _, directory in group_directories("memory")):
        return None
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "engine.memory.trial", str(most)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
        text=True,
    )
    last = Trial(taken=0, total=look().total)
    timer = threading.Timer(_START_S + most / _LEAST_RATE, process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            taken, total = map(int, line.split())
            last = Trial(taken=taken, total=total)
    finally:
        timer.cancel()
        process.kill()
        process.communicate()
    return last if last.taken else None


def take(most: int, look: Callable[[], Seen], hold: Callable[[int], None]) -> Iterator[Trial]:
    """Allocate up to `most` bytes by `hold`, and yield after each piece what is allocated and what `look` reports.

    Ends early where no more is available, and where the system begins to swap. Memory that can grow does so before: a
    kernel takes more of it into use as soon as one of its zones is empty.
    """
    seen = first = look()
    taken = 0
    while taken < most and seen.available >= _STEP and seen.free_swap >= first.free_swap - _SWAPPED:
        step = min(most - taken, _LARGE_STEP if seen.available >= _FAR else _STEP)
        hold(step)
        taken, seen = taken + step, look()
        yield Trial(taken=taken, total=seen.total)


def _main() -> None:
    most = int(sys.argv[1])
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    held: list[mmap.mmap] = []
    threads = min(16, usable_cores())
    with ThreadPoolExecutor(threads) as pool:

        def hold(num_bytes: int) -> None:
            pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            held.append(pages)
            first, part = ctypes.addressof(ctypes.c_char.from_buffer(pages)), -(-num_bytes // threads)
            for each in [
                pool.submit(ctypes.memset, first + start, 1, min(part, num_bytes - start))
                for start in range(0, num_bytes, part)
            ]:
                each.result()

        for trial in take(most, look, hold):
            print(trial.taken, trial.total, flush=True)  # nobody reads it any more: an error, and the end


if __name__ == "__main__":
    _main()
