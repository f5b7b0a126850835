"""Reads and writes many parts of files at once, by direct I/O into their target memory."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.memory.disk.file import BLOCK, READERS, ByteRange, DiskFile, Request, align_up, requests_of

if TYPE_CHECKING:
    import torch

_SMALL_BYTES = 1 << 20
"""The largest size of a request that uses a thread's own aligned buffer."""

Bytes = np.ndarray[Any, Any]


class DiskIO:
    """A few threads, each with a small aligned buffer of its own, for parts of files that are not aligned."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="flexgen-disk")
        self._own = threading.local()

    def submit(self, work: Callable[..., None], *arguments: Any) -> Future[None]:
        """Run `work` in one of the threads."""
        return self._pool.submit(work, *arguments)

    def read(self, spans: Iterable[ByteRange], memory: torch.Tensor) -> list[Future[None]]:
        """Start reading `spans` into host `memory` (uint8 `[bytes]`), which is filled when all the futures are done."""
        flat: Bytes = memory.numpy()
        return [self._pool.submit(self._read, request, flat) for request in requests_of(spans, _SMALL_BYTES)]

    def write(self, file: DiskFile, spans: Iterable[ByteRange], memory: torch.Tensor) -> None:
        """Write `spans` of `file` from host `memory` (uint8 `[bytes]`); returns when all are written."""
        flat: Bytes = memory.numpy()
        with file.writing:
            pieces = requests_of(spans, _SMALL_BYTES, BLOCK)
            if len(pieces) == 1:
                self._write(pieces[0], flat)
                return
            futures = [self._pool.submit(self._write, request, flat) for request in pieces]
            wait_for(futures)

    def close(self) -> None:
        """Wait for the work under way, and drop the work that has not begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, request: Request, memory: Bytes) -> None:
        buffer = self._buffer(request.num_bytes)
        request.file.read(request.first, buffer.data, request.end - request.first)
        for offset, at, size in request.parts:
            memory[at : at + size] = buffer[offset : offset + size]

    def _write(self, request: Request, memory: Bytes) -> None:
        buffer, size = self._buffer(request.num_bytes), request.num_bytes
        if not _is_covered(request):
            request.file.read(request.first, buffer.data, size)
        for offset, at, count in request.parts:
            buffer[offset : offset + count] = memory[at : at + count]
        request.file.write(request.first, buffer.data)

    def _buffer(self, num_bytes: int) -> Bytes:
        """The aligned buffer of this thread, valid until the next call."""
        held: Bytes | None = getattr(self._own, "buffer", None)
        if held is None or len(held) < num_bytes:
            held = np.frombuffer(mmap.mmap(-1, align_up(num_bytes)), dtype=np.uint8)
            self._own.buffer = held
        return held[:num_bytes]


def wait_for(futures: Iterable[Future[None]]) -> None:
    """Wait until all are done, then raise the first error, if any."""
    fault: BaseException | None = None
    for future in futures:
        fault = fault or future.exception()
    if fault is not None:
        raise fault


def _is_covered(request: Request) -> bool:
    """Whether a request's parts cover all of its blocks."""
    reached = 0
    for offset, _, size in request.parts:
        if offset > reached:
            return False
        reached = max(reached, offset + size)
    return reached == request.num_bytes
