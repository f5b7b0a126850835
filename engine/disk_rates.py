"""How fast a directory's disk reads and writes: direct I/O by several threads on a file that has no name."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from engine.errors import CapacityError, ConfigError
from engine.hardware import existing_parent, free_disk

_CHUNK = 8 << 20
_THREADS = 8
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_rates(directory: str, *, num_bytes: int, seconds: float) -> tuple[float, float]:
    """(read, written) bytes per second where `directory` is, or will be made.

    Writes at most `num_bytes` (and a quarter of what is free) and takes about `seconds` in each direction. Raises
    `CapacityError` for a full disk, `ConfigError` for a directory that cannot be written.
    """
    folder = existing_parent(directory)
    num_chunks = min(num_bytes, free_disk(folder) // 4) // _CHUNK
    if num_chunks < 1:
        free = free_disk(folder) / 1e6
        raise CapacityError(
            f"offload-dir {directory}: {free:.0f} MB free are too few to measure the disk; name another directory"
        )
    try:
        return _rates(folder, num_chunks, seconds)
    except OSError as error:
        where = f"offload-dir {directory}"
        if error.errno in _FULL:
            raise CapacityError(
                f"{where}: no room for the {num_chunks * _CHUNK / 1e6:.0f} MB that measuring the disk takes "
                f"({error.strerror}); name another directory"
            ) from None
        raise ConfigError(f"{where} cannot be measured: {error.strerror}; name another directory") from None


def _rates(folder: str, num_chunks: int, seconds: float) -> tuple[float, float]:
    with _nameless_file(folder) as handle, mmap.mmap(-1, _CHUNK) as buffer:  # a mapping is aligned, as it must be
        buffer[:] = os.urandom(_CHUNK)  # a disk may compress
        # Writes that extend a file wait for each other.
        os.posix_fallocate(handle, 0, num_chunks * _CHUNK)
        start = time.perf_counter()
        written = _transfer(lambda place: os.pwritev(handle, [buffer], place), range(num_chunks), seconds)
        os.fdatasync(handle)
        write_rate = sum(written.values()) / (time.perf_counter() - start)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)  # for a file system without direct I/O
        start = time.perf_counter()
        # All threads read into one buffer: nobody looks at it.
        read = _transfer(lambda place: os.preadv(handle, [buffer], place), sorted(written), seconds)
        return sum(read.values()) / (time.perf_counter() - start), write_rate


def _transfer(call: Callable[[int], int], chunks: range | list[int], seconds: float) -> dict[int, int]:
    """Call `call` with the places of `chunks`, several at once, for `seconds`; bytes by chunk."""
    waiting, deadline = iter(chunks), time.perf_counter() + seconds
    done: dict[int, int] = {}

    def work() -> None:
        for chunk in waiting:
            done[chunk] = call(chunk * _CHUNK)
            if time.perf_counter() > deadline:
                return

    with ThreadPoolExecutor(_THREADS) as pool:
        for future in [pool.submit(work) for _ in range(_THREADS)]:
            future.result()
    return done


@contextmanager
def _nameless_file(folder: str) -> Iterator[int]:
    """A file opened for direct I/O where there is such; it loses its name at once, so nothing can leave it behind."""
    plain, name = tempfile.mkstemp(prefix="flexgen-", dir=folder)
    try:
        handle = _open_direct(name)
    finally:
        os.close(plain)
        Path(name).unlink()
    try:
        yield handle
    finally:
        os.close(handle)


def _open_direct(name: str) -> int:
    try:
        return os.open(name, os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(name, os.O_RDWR)
