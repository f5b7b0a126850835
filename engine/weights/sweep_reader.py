"""Reads weights from disk ahead of the sweep, in its order, so that the disk never waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from engine.memory.disk.file import BLOCK, PIECE_BYTES, READERS, ByteRange, Request, requests_of
from engine.memory.disk.io import DiskIO

_PIECES = 4 * READERS
"""The least number of pieces of the staging memory: as many are being read as the disk supports, others wait to be
copied."""


def piece_bytes(staging_bytes: int) -> int:
    """The size of one read into so much staging memory (whole blocks)."""
    return max(BLOCK, min(PIECE_BYTES, staging_bytes // _PIECES // BLOCK * BLOCK))


@dataclass(frozen=True)
class _Reading:
    """A request under way, and the piece of the staging memory that it fills."""

    unit: int
    request: Request
    piece: int
    done: Future[None]


class SweepReader:
    """A ring of staging memory, filled by reads of units that the sweep takes one after the other, in rotation.

    Reads run ahead as far as the ring reaches: past the current unit, past the end of the sweep. One thread takes.
    """

    def __init__(
        self,
        io: DiskIO,
        staging: torch.Tensor,
        units: list[Callable[[], list[ByteRange]]],
        is_ready: Callable[[int], bool],
        *,
        ahead: bool,
    ) -> None:
        """`units`: the reads of each, requested once it `is_ready`; `ahead`: whether to read the units that follow."""
        self._io = io
        self._size = piece_bytes(staging.numel())
        self._staging = staging
        self._units = units
        self._requests: dict[int, list[Request]] = {}
        self._is_ready = is_ready
        self._ahead = ahead
        self._free: deque[tuple[int, Any]] = deque((piece, None) for piece in range(staging.numel() // self._size))
        """The free pieces, and the event of the last copy out of each."""
        self._under_way: deque[_Reading] = deque()
        self._next = (0, 0)
        """The unit and number of the next request to start."""

    def take(self, unit: int, copied: Callable[[], Any]) -> Iterator[tuple[Request, torch.Tensor]]:
        """Yield a unit's requests, each with the memory that holds its blocks until the next one is requested.

        copied: returns the event of the copy out of it, for which the next read into it waits; None if it is done.
        """
        requests = self._requests_of(unit)
        if not requests:
            return
        if not self._under_way or self._under_way[0].unit != unit:
            self._drop(unit)
        for _ in requests:
            self._start(unit)
            reading = self._under_way.popleft()
            reading.done.result()
            first = reading.piece * self._size
            yield reading.request, self._staging[first : first + reading.request.num_bytes]
            self._free.append((reading.piece, copied()))
        self._start(unit)

    def close(self) -> None:
        """Wait until nothing is being read."""
        self._drop(-1)

    def _drop(self, unit: int) -> None:
        """Discard what was read ahead of other units; go on with `unit`."""
        while self._under_way and self._under_way[0].unit != unit:
            reading = self._under_way.popleft()
            with suppress(Exception):  # a fault of what nobody asked for
                reading.done.result()
            self._free.append((reading.piece, None))
        if not self._under_way:
            self._next = (unit, 0)

    def _requests_of(self, unit: int) -> list[Request]:
        if unit not in self._requests:
            self._requests[unit] = requests_of(self._units[unit](), self._size)
        return self._requests[unit]

    def _start(self, current: int) -> None:
        """Start as many reads as there are free pieces."""
        passed = 0
        while self._free and passed <= len(self._units):
            unit, number = self._next
            if unit != current and not self._is_ready(unit):
                return
            requests = self._requests_of(unit)
            if number >= len(requests):
                if not self._ahead:
                    return
                self._next = ((unit + 1) % len(self._units), 0)
                passed += 1
                continue
            piece, copied = self._free.popleft()
            first = piece * self._size
            memory = self._staging[first : first + self._size]
            done = self._io.submit(_read, requests[number], memory, copied)
            self._under_way.append(_Reading(unit, requests[number], piece, done))
            self._next = (unit, number + 1)


def _read(request: Request, memory: torch.Tensor, copied: Any) -> None:
    if copied is not None:
        copied.synchronize()
    whole = memory.numpy()[: request.num_bytes].data
    request.file.read(request.first, whole, request.end - request.first)
