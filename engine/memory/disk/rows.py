"""Tables of rows on disk, written after and read ahead of the computation, by way of host memory."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from engine.memory import accelerator
from engine.memory.arena import Arena
from engine.memory.disk.file import ByteRange, DiskFile
from engine.memory.disk.io import wait_for

_BEHIND = 2
"""The most writes that wait or are under way: each holds a micro-batch's rows in memory."""


@dataclass(frozen=True)
class Fetch:
    """Rows that are being read from the disk."""

    memory: torch.Tensor
    reads: list[Future[None]]

    def rows(self) -> torch.Tensor:
        """Wait for the bytes `[rows, row_bytes]` in host memory; raises the error that prevented the read."""
        wait_for(self.reads)
        return self.memory


class DiskRows:
    """Tables of equally many rows of bytes, in one unnamed file each; one thread writes and reads.

    Rows given to `write` can be fetched once the future that it returned is done, or after `settle`.
    """

    def __init__(self, arena: Arena, row_bytes: list[int]) -> None:
        self._arena = arena
        self._row_bytes = row_bytes
        self._files: list[DiskFile] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="flexgen-disk-rows")
        self._behind: deque[Future[None]] = deque()

    def grow(self, num_rows: int) -> None:
        """Enlarge every table to `num_rows`; `CapacityError` where the disk is full."""
        if not self._files:
            self._files = [self._arena.file(num_rows * size) for size in self._row_bytes]
            return
        for file, size in zip(self._files, self._row_bytes, strict=True):
            self._arena.grow_file(file, num_rows * size)

    def write(self, table: int, pieces: list[tuple[int, torch.Tensor]]) -> Future[None]:
        """Start writing (first row, rows on any device) pieces; raises the fault of an earlier write."""
        while len(self._behind) >= _BEHIND or (self._behind and self._behind[0].done()):
            self._behind.popleft().result()
        size, spans, at = self._row_bytes[table], [], 0
        for first, rows in pieces:
            num_bytes = len(rows) * size
            spans.append(ByteRange(self._files[table], first * size, first * size + num_bytes, at))
            at += num_bytes
        joined = torch.cat([rows.reshape(-1).view(torch.uint8) for _, rows in pieces])
        copied = None
        has_streams = accelerator.has_streams(self._arena.device)
        if joined.device.type != "cpu" or has_streams:
            memory = accelerator.transit(self._arena.device, at)
            memory.copy_(joined, non_blocking=has_streams)
            if has_streams:
                copied = accelerator.current_stream(self._arena.device).record_event()
            joined = memory
        future = self._writer.submit(self._write, self._files[table], spans, joined, copied)
        self._behind.append(future)
        return future

    def fetch(self, table: int, runs: list[tuple[int, int]]) -> Fetch:
        """Start reading (first row, rows) runs of a table, which are concatenated."""
        size, spans, at = self._row_bytes[table], [], 0
        for first, num_rows in runs:
            spans.append(ByteRange(self._files[table], first * size, (first + num_rows) * size, at))
            at += num_rows * size
        memory = accelerator.transit(self._arena.device, at)
        return Fetch(memory.view(-1, size), self._arena.io.read(spans, memory))

    def settle(self) -> None:
        """Wait until everything has been written; raises the error of a failed write."""
        while self._behind:
            self._behind.popleft().result()

    def close(self) -> None:
        """Wait until nothing is being written any more; the arena closes the files."""
        self._writer.shutdown(wait=True, cancel_futures=True)
        self._behind.clear()
        self._files = []

    def _write(self, file: DiskFile, spans: list[ByteRange], memory: torch.Tensor, copied: Any) -> None:
        if copied is not None:
            copied.synchronize()
        self._arena.io.write(file, spans, memory)
