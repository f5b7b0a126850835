"""Reads mapped tensors into the page cache before they are used, with several reads at once."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import CheckpointError
from engine.reading import reason

if TYPE_CHECKING:
    import torch

_READERS = 4
PIECE_BYTES = 8 << 20
"""The bytes that are read, and checksummed, at once."""
_MADV_POPULATE_READ = 22
_AHEAD_BYTES = 2 << 30
"""The most bytes to read ahead: when host memory is short, pages must not be evicted before they are used."""


@dataclass(frozen=True)
class FileSpan:
    """The bytes of a weight file from `first` to `end`."""

    file: Path
    first: int
    end: int


@dataclass(frozen=True)
class Step:
    """A step of loading, and the mapped tensors that it reads."""

    act: Callable[[], None]
    tensors: list[torch.Tensor]
    spans: tuple[FileSpan, ...] = ()
    """The tensors' ranges in the checkpoint's files, as far as they are known."""
    sums: list[int] | None = None
    """The CRC-32 of each piece of `PIECE_BYTES`, tensor by tensor, if they are to be checked while they are read."""
    reject: Callable[[], None] = lambda: None
    """Called instead of `act` if the checksums differ from `sums`."""


_madvise: Any = ctypes.CDLL(None, use_errno=True).madvise if sys.platform == "linux" else None


def run_steps(steps: Iterable[Step], follow: Callable[[FileSpan], None]) -> Iterator[None]:
    """Execute `steps` in order, one an iteration, while the tensors of later ones are read from disk.

    Copying out of a mapped file takes its page faults one at a time, which leaves a fast disk idle most of the time.
    `follow` is called for the spans of a step when they have been read. Raises `CheckpointError` for a file that cannot
    be read any more.
    """
    waiting: deque[tuple[Step, list[Future[int | None]], int]] = deque()
    held = 0
    with ThreadPoolExecutor(_READERS, thread_name_prefix="flexgen-read") as pool:
        try:
            for step in steps:
                pieces = [piece for tensor in step.tensors for piece in _pieces(tensor)]
                read = _touch if step.sums is None else _summed
                waiting.append((step, [pool.submit(read, piece) for piece in pieces], sum(map(len, pieces))))
                held += waiting[-1][2]
                while held > _AHEAD_BYTES:
                    held -= _do(*waiting.popleft(), follow)
                    yield
            while waiting:
                held -= _do(*waiting.popleft(), follow)
                yield
        finally:
            pool.shutdown(cancel_futures=True)


def _do(step: Step, reads: list[Future[int | None]], num_bytes: int, follow: Callable[[FileSpan], None]) -> int:
    try:
        sums = [read.result() for read in reads]
    except OSError:
        if step.sums is None:
            raise _unreadable(step.spans) from None
        sums = None  # what is kept can be made again
    for span in step.spans:
        follow(span)
    if step.sums is None or sums == step.sums:
        step.act()
    else:
        step.reject()
    return num_bytes


def _pieces(tensor: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    if not tensor.is_contiguous():  # of old `.bin` files; a copy would take memory
        return []
    import torch

    flat: np.ndarray[Any, Any] = tensor.reshape(-1).view(torch.uint8).numpy()
    return [flat[first : first + PIECE_BYTES] for first in range(0, len(flat), PIECE_BYTES)]


def _summed(piece: np.ndarray[Any, Any]) -> int:
    """The CRC-32 of mapped bytes, which are in memory afterwards."""
    _touch(piece)
    return zlib.crc32(piece.data)  # lets go of the interpreter, too


def _touch(piece: np.ndarray[Any, Any]) -> None:
    """Bring the pages of mapped bytes into memory."""
    first = piece.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    size = piece.ctypes.data + len(piece) - first
    # One request for the whole piece: page faults of several threads spoil each other's reading ahead in one file.
    whole = ctypes.c_void_p(first), ctypes.c_size_t(size)
    if _madvise is None or _madvise(*whole, _MADV_POPULATE_READ):  # Linux knows it since 5.14
        if _madvise is not None and ctypes.get_errno() == errno.EFAULT:  # touching them would end the process
            raise OSError(errno.EFAULT, "pages of a mapped file cannot be read")
        np.add.reduce(piece[:: mmap.PAGESIZE], dtype=np.uint64)  # lets go of the interpreter meanwhile


def _unreadable(spans: tuple[FileSpan, ...]) -> CheckpointError:
    """The error for the file of `spans` that could not be read into memory."""
    for span in spans:
        try:
            _read(span)
        except OSError as error:
            return CheckpointError(
                f"{span.file} cannot be read any more: {reason(error)}; start again when it can, and copy the model to "
                "a disk of this machine if it is on a network drive that fails"
            )
    return CheckpointError("a weight file could not be read for a moment; start again")


def _read(span: FileSpan) -> None:
    """Read the bytes of a span; `OSError` if they are not there."""
    with open(span.file, "rb", buffering=0) as stream:
        for at in range(span.first, span.end, PIECE_BYTES):
            size = min(PIECE_BYTES, span.end - at)
            if len(os.pread(stream.fileno(), size, at)) < size:
                raise OSError(errno.EIO, "it is shorter than it was")
