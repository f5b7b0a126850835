"""Brings mapped tensors into the page cache before they are wanted, by several reads at once."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

_READERS = 4
_PIECE_BYTES = 8 << 20
_MADV_POPULATE_READ = 22
_AHEAD_BYTES = 2 << 30
"""Read ahead at most: host memory that is short must not lose the pages again before they are wanted."""

Step = tuple[Callable[[], None], list["torch.Tensor"]]
"""Something to do, and the mapped tensors that it reads."""

_madvise: Any = ctypes.CDLL(None).madvise if sys.platform == "linux" else None


def run_steps(steps: Iterable[Step]) -> Iterator[None]:
    """Do `steps` in order, one an iteration, while the tensors of later ones are read from disk.

    Copying out of a mapped file takes its page faults in turn, which leaves a fast disk idle most of the time.
    """
    waiting: deque[tuple[Callable[[], None], list[Future[None]], int]] = deque()
    held = 0
    with ThreadPoolExecutor(_READERS, thread_name_prefix="flexgen-read") as pool:
        try:
            for act, tensors in steps:
                pieces = [piece for tensor in tensors for piece in _pieces(tensor)]
                waiting.append((act, [pool.submit(_touch, piece) for piece in pieces], sum(map(len, pieces))))
                held += waiting[-1][2]
                while held > _AHEAD_BYTES:
                    held -= _do(*waiting.popleft())
                    yield
            while waiting:
                held -= _do(*waiting.popleft())
                yield
        finally:
            pool.shutdown(cancel_futures=True)


def _do(act: Callable[[], None], reads: list[Future[None]], num_bytes: int) -> int:
    for read in reads:
        read.result()
    act()
    return num_bytes


def _pieces(tensor: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    if not tensor.is_contiguous():  # of old `.bin` files; a copy would take memory
        return []
    import torch

    flat: np.ndarray[Any, Any] = tensor.reshape(-1).view(torch.uint8).numpy()
    return [flat[first : first + _PIECE_BYTES] for first in range(0, len(flat), _PIECE_BYTES)]


def _touch(piece: np.ndarray[Any, Any]) -> None:
    """Bring the pages of mapped bytes into memory."""
    first = piece.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    size = piece.ctypes.data + len(piece) - first
    # One request for the whole piece: page faults of several threads spoil each other's reading ahead in one file.
    whole = ctypes.c_void_p(first), ctypes.c_size_t(size)
    if _madvise is None or _madvise(*whole, _MADV_POPULATE_READ):  # Linux knows it since 5.14
        np.add.reduce(piece[:: mmap.PAGESIZE], dtype=np.uint64)  # lets go of the interpreter meanwhile
