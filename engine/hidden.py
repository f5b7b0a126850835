"""Hidden states between layers: whole sequences on one tier each, by percents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.arena import Arena
from engine.batch import Rows
from engine.placement import TIERS, Tier
from engine.policy import Share


@dataclass(frozen=True)
class _Run:
    """Neighbouring rows of a micro-batch that are kept on one tier."""

    tier: Tier
    first: int
    end: int
    offset: int
    """First row in the tier's buffer."""


class HiddenStates:
    """Keeps what a layer leaves for the next one: rows `[rows, width]` of every micro-batch of a sweep."""

    def __init__(self, arena: Arena, share: Share, width: int, dtype: torch.dtype) -> None:
        self._arena = arena
        self._share = share
        self._width = width
        self._dtype = dtype
        self._buffers: dict[Tier, torch.Tensor] = {}
        self._runs: list[list[_Run]] = []
        self._on_device: dict[tuple[int, int], torch.Tensor] = {}
        self.num_spans: dict[Tier, int] = dict.fromkeys(TIERS, 0)
        """Spans of the sweep in hand, by tier."""

    def begin(self, batches: Sequence[Rows]) -> None:
        """Give every span of a new sweep its tier."""
        count = sum(len(batch.segments) for batch in batches)
        device_end = round(count * self._share.gpu / 100)
        host_end = round(count * (self._share.gpu + self._share.cpu) / 100)
        self.num_spans = {"device": device_end, "host": host_end - device_end, "disk": count - host_end}
        self._runs, self._on_device = [], {}
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
        for tier in ("host", "disk"):
            self._reserve(tier, rows[tier])

    def _reserve(self, tier: Tier, num_rows: int) -> None:
        buffer = self._buffers.get(tier)
        num_bytes = num_rows * self._width * self._dtype.itemsize
        if buffer is not None and buffer.numel() * buffer.element_size() >= num_bytes:
            return
        if buffer is not None:
            self._arena.free(self._buffers.pop(tier))
        if num_bytes:
            self._buffers[tier] = self._arena.empty(num_bytes, tier).view(self._dtype).view(-1, self._width)

    def put(self, index: int, hidden: torch.Tensor) -> None:
        """Keep the hidden states `[rows, width]` of micro-batch `index`."""
        runs = self._runs[index]
        for number, run in enumerate(runs):
            rows = hidden[run.first : run.end]
            if run.tier == "device":
                self._on_device[index, number] = rows if len(runs) == 1 else rows.clone()
            else:
                size = run.end - run.first
                self._buffers[run.tier][run.offset : run.offset + size].copy_(rows, non_blocking=True)

    def take(self, index: int) -> torch.Tensor:
        """The hidden states `[rows, width]` of micro-batch `index`, on the device."""
        runs = self._runs[index]
        if len(runs) == 1 and runs[0].tier == "device":
            return self._on_device.pop((index, 0))
        hidden = torch.empty(runs[-1].end, self._width, dtype=self._dtype, device=self._arena.device)
        for number, run in enumerate(runs):
            size = run.end - run.first
            if run.tier == "device":
                stored = self._on_device.pop((index, number))
            else:
                stored = self._buffers[run.tier][run.offset : run.offset + size]
            hidden[run.first : run.end].copy_(stored, non_blocking=True)
        return hidden

    def close(self) -> None:
        """Let go of the buffers; the arena frees them."""
        self._buffers.clear()
        self._on_device.clear()
