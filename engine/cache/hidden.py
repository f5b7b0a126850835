"""Hidden states between layers: each sequence lies on one tier, by the policy's percents."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from engine.batch.rows import Rows
from engine.memory import accelerator
from engine.memory.arena import Arena
from engine.memory.disk.rows import DiskRows, Fetch
from engine.memory.tiers import TIERS, Tier
from engine.policy import Share


@dataclass(frozen=True)
class _Run:
    """Adjacent rows of a micro-batch that are kept on one tier."""

    tier: Tier
    first: int
    end: int
    offset: int
    """The first row in the tier's buffer."""


class HiddenStates:
    """Keeps the output of a layer for the next one: rows `[rows, width]` of every micro-batch of a sweep."""

    def __init__(self, arena: Arena, share: Share, width: int, dtype: torch.dtype) -> None:
        self._arena = arena
        self._share = share
        self._width = width
        self._dtype = dtype
        self._on_host = torch.empty(0, width, dtype=dtype)
        self._runs: list[list[_Run]] = []
        self._on_device: dict[tuple[int, int], torch.Tensor] = {}
        self._disk = DiskRows(arena, [width * dtype.itemsize])
        self._disk_rows = 0
        self._written: dict[int, Future[None]] = {}
        """The rows of each micro-batch that are on disk, or being written, and were not taken yet."""
        self._fetched: dict[int, Fetch] = {}
        self.num_spans: dict[Tier, int] = dict.fromkeys(TIERS, 0)
        """The number of spans of the current sweep, by tier."""

    def begin(self, batches: Sequence[Rows]) -> None:
        """Assign a tier to every span of a new sweep."""
        count = sum(len(batch.segments) for batch in batches)
        device_end = round(count * self._share.gpu / 100)
        host_end = round(count * (self._share.gpu + self._share.cpu) / 100)
        self.num_spans = {"device": device_end, "host": host_end - device_end, "disk": count - host_end}
        self._runs, self._on_device, self._written, self._fetched = [], {}, {}, {}
        rows: dict[Tier, int] = dict.fromkeys(TIERS, 0)
        index = 0
        for batch in batches:
            runs: list[_Run] = []
            for segment in batch.segments:
                tier: Tier = "device" if index < device_end else "host" if index < host_end else "disk"
                if runs and runs[-1].tier == tier:
                    runs[-1] = _Run(tier, runs[-1].first, segment.end, runs[-1].offset)
                else:
                    runs.append(_Run(tier, segment.begin, segment.end, rows[tier]))
                rows[tier] += segment.end - segment.begin
                index += 1
            self._runs.append(runs)
        self._reserve(rows["host"])
        if rows["disk"] > self._disk_rows:
            self._disk.grow(rows["disk"])
            self._disk_rows = rows["disk"]

    def _reserve(self, num_rows: int) -> None:
        """Reserve buffer space for so many rows on the host."""
        if num_rows > len(self._on_host):
            self._arena.free(self._on_host)
            memory = self._arena.empty(num_rows * self._width * self._dtype.itemsize, "host")
            self._on_host = memory.view(self._dtype).view(-1, self._width)

    def put(self, index: int, hidden: torch.Tensor) -> None:
        """Store the hidden states `[rows, width]` of micro-batch `index`."""
        runs = self._runs[index]
        to_disk: list[tuple[int, torch.Tensor]] = []
        for number, run in enumerate(runs):
            rows = hidden[run.first : run.end]
            if run.tier == "device":
                self._on_device[index, number] = rows if len(runs) == 1 else rows.clone()
            elif run.tier == "disk":
                to_disk.append((run.offset, rows))
            else:
                size = run.end - run.first
                self._on_host[run.offset : run.offset + size].copy_(rows, non_blocking=True)
        if to_disk:
            self._written[index] = self._disk.write(0, to_disk)

    def take(self, index: int) -> torch.Tensor:
        """Return the hidden states `[rows, width]` of micro-batch `index`, on the device."""
        runs = self._runs[index]
        if len(runs) == 1 and runs[0].tier == "device":
            return self._on_device.pop((index, 0))
        from_disk = self._from_disk(index)
        hidden = torch.empty(runs[-1].end, self._width, dtype=self._dtype, device=self._arena.device)
        for number, run in enumerate(runs):
            size = run.end - run.first
            if run.tier == "device":
                stored = self._on_device.pop((index, number))
            elif run.tier == "disk":
                stored, from_disk = from_disk[:size], from_disk[size:]
            else:
                stored = self._on_host[run.offset : run.offset + size]
            # What came from disk is kept until the copy has been made only where there are streams.
            is_kept = run.tier != "disk" or accelerator.has_streams(self._arena.device)
            hidden[run.first : run.end].copy_(stored, non_blocking=is_kept)
        return hidden

    def _from_disk(self, index: int) -> torch.Tensor:
        """Return the rows `[rows, width]` of a micro-batch that are on disk, and start to read those of the next."""
        self._fetch(index)
        self._fetch((index + 1) % len(self._runs))
        if index not in self._fetched:
            return torch.empty(0, self._width, dtype=self._dtype)
        return self._fetched.pop(index).rows().view(self._dtype)

    def _fetch(self, index: int) -> None:
        if index in self._written:
            self._written.pop(index).result()
            runs = [(run.offset, run.end - run.first) for run in self._runs[index] if run.tier == "disk"]
            self._fetched[index] = self._disk.fetch(0, runs)

    def close(self) -> None:
        """Release the buffers; the arena frees them."""
        self._disk.close()
        self._on_host = self._on_host[:0]
        self._on_device.clear()
