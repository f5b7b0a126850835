"""Measures how fast a disk reads and writes: direct I/O by several threads, as the disk tier uses it (pure)."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from engine.errors import CapacityError, ConfigError, EngineError
from engine.memory.disk.file import PIECE_BYTES, READERS, DiskFile
from engine.memory.paths import existing_parent
from engine.planning.hardware import free_disk

_Place = TypeVar("_Place")


def disk_rates(directory: str, *, num_bytes: int, seconds: float) -> tuple[float, float]:
    """The (read, write) rates in bytes per second of the disk of `directory`, which need not exist yet.

    It writes at most `num_bytes` (and a quarter of the free space) and takes about `seconds` in each direction. Raises
    `CapacityError` for a full disk, `ConfigError` for a directory that cannot be written.
    """
    folder = existing_parent(directory)
    num_chunks = min(num_bytes, free_disk(folder) // 4) // PIECE_BYTES
    if num_chunks < 1:
        free = free_disk(folder) / 1e6
        raise CapacityError(
            f"offload-dir {directory}: {free:.0f} MB free are too few to measure the disk; name another directory"
        )
    try:
        # Claimed before: writes that extend a file wait for each other.
        with closing(DiskFile.create(folder, num_chunks * PIECE_BYTES)) as file:
            return _rates(file, num_chunks, seconds)
    except (CapacityError, ConfigError):  # they name the directory
        raise
    except EngineError as error:
        raise ConfigError(f"offload-dir {directory} cannot be measured: {error}") from None


def read_rate(files: Sequence[Path], *, most_bytes: int, num_threads: int = READERS) -> float:
    """The rate in bytes per second of direct reads, spread over `files`, of about `most_bytes` in all.

    Raises `CapacityError` where every file is smaller than one read.
    """
    opened = [DiskFile.open(path) for path in files]
    try:
        places = [
            (file, first)
            for file, path in zip(opened, files, strict=True)
            for first in range(0, path.stat().st_size - PIECE_BYTES + 1, PIECE_BYTES)
        ]
        if not places:
            raise CapacityError(f"no file has the {PIECE_BYTES >> 20} MiB of one read; take larger ones")
        places = places[:: max(1, len(places) * PIECE_BYTES // most_bytes)]
        memory = memoryview(mmap.mmap(-1, PIECE_BYTES))
        start = time.perf_counter()
        done = _transfer(lambda place: place[0].read(place[1], memory, PIECE_BYTES), places, float("inf"), num_threads)
        return len(done) * PIECE_BYTES / (time.perf_counter() - start)
    finally:
        for file in opened:
            file.close()


def _rates(file: DiskFile, num_chunks: int, seconds: float) -> tuple[float, float]:
    buffer = mmap.mmap(-1, PIECE_BYTES)  # aligned, as it must be
    buffer[:] = os.urandom(PIECE_BYTES)  # a disk may compress
    memory = memoryview(buffer)
    chunks = range(0, num_chunks * PIECE_BYTES, PIECE_BYTES)
    start = time.perf_counter()
    written = _transfer(lambda first: file.write(first, memory), chunks, seconds)
    file.settle()
    write_rate = len(written) * PIECE_BYTES / (time.perf_counter() - start)
    start = time.perf_counter()
    # All threads read into one buffer: nobody looks at it.
    read = _transfer(lambda first: file.read(first, memory, PIECE_BYTES), sorted(written), seconds)
    return len(read) * PIECE_BYTES / (time.perf_counter() - start), write_rate


def _transfer(
    call: Callable[[_Place], None], places: Iterable[_Place], seconds: float, num_threads: int = READERS
) -> list[_Place]:
    """Call `call` with each of `places`, several at once, for `seconds`; return the places that were used."""
    waiting, deadline = iter(places), time.perf_counter() + seconds
    done: list[_Place] = []

    def work() -> None:
        for place in waiting:
            call(place)
            done.append(place)
            if time.perf_counter() > deadline:
                return

    with ThreadPoolExecutor(num_threads) as pool:
        for future in [pool.submit(work) for _ in range(num_threads)]:
            future.result()
    return done
