"""Decode steps of a micro-batch that one attention call serves, and where their keys and values are stored."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from engine.batch.reach import Reach
from engine.memory import accelerator
from engine.memory.tiers import Tier
from engine.schedule.block import Block
from engine.schedule.segment import Segment
from engine.schedule.sequence import Prefix


@dataclass(frozen=True)
class StoredRun:
    """Adjacent rows of a table that one copy brings to the device, gaps between blocks included."""

    first: int
    end: int


class DecodeGroup:
    """Decode steps with equally many new rows each that continue the same chain of prefixes (or none)."""

    def __init__(self, segments: list[Segment], device: torch.device, gap_rows: int = 0) -> None:
        self.chain: tuple[Prefix, ...] = segments[0].span.chain
        self.segments = segments
        self.first, self.end = segments[0].first, segments[-1].end
        self.steps = segments[0].num_rows
        """The number of new rows of each sequence: its last token, and its drafted tokens."""
        past = torch.tensor([segment.past for segment in segments])
        self.length = int(past.max()) + self.steps
        self.past = accelerator.sent(past, device)
        self.own_lengths = accelerator.sent(past + self.steps, device, torch.int32)
        borders = torch.arange(len(segments) + 1, dtype=torch.int32)
        self.row_borders = accelerator.sent(borders * self.steps, device)
        """The start of each sequence's queries: int32 `[sequences + 1]`."""
        blocks = [segment.span.block for segment in segments if segment.span.block is not None]
        self.tier: Tier = blocks[0].tier
        """The tier of all own tokens."""
        self.stored_runs: list[StoredRun] = []
        """Rows of its table, if not on the device, that hold the own tokens and room for the new ones: staged rows are
        these, one behind the other."""
        firsts = [block.first for block in blocks]
        if not self.is_on_device:
            self.stored_runs, firsts = _stored_runs(
                blocks, [segment.past + self.steps for segment in segments], gap_rows
            )
        self.own_borders = accelerator.sent(torch.tensor([*firsts, firsts[-1]], dtype=torch.int32), device)
        """The start of each sequence's own tokens, in the device's table or among the staged rows: int32 `[sequences
        + 1]`."""
        self._start = segments[0].span.start
        self._masks: dict[Reach, torch.Tensor] = {}

    @property
    def is_on_device(self) -> bool:
        """Whether the keys and values of all the sequences' own tokens are in the device's table."""
        return self.tier == "device"

    @cached_property
    def own_index(self) -> torch.Tensor:
        """Rows, in the device's table or among the staged ones, that hold the own tokens, `[sequences * length]`.

        Beyond a sequence's length the index stays on its last row: written, and masked.
        """
        ends = self.past[:, None] + self.steps - 1
        own = torch.minimum(torch.arange(self.length, device=ends.device), ends)
        return (self.own_borders[:-1, None] + own).flatten()

    @cached_property
    def new_index(self) -> torch.Tensor:
        """The index of each sequence's new rows in the gathered table, `[sequences * steps]`."""
        new = self.past[:, None] + torch.arange(self.steps, device=self.past.device)
        return (self.own_borders[:-1, None] + new).flatten()

    @cached_property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first row of each sequence in its table, and its number of rows with the new ones: int64 on the host."""
        spots = [(s.span.block.first, s.past + self.steps) for s in self.segments if s.span.block is not None]
        firsts, lengths = torch.tensor(spots).T.contiguous()
        return firsts, lengths

    def mask(self, reach: Reach) -> torch.Tensor:
        """The additive attention mask, 0 or -inf: float32 `[sequences, steps, prefix + length]`."""
        if reach not in self._masks:
            device = self.past.device
            positions = self._start + self.past[:, None] + torch.arange(self.steps, device=device)
            seen = reach.sees(positions[:, :, None], torch.arange(self._start + self.length, device=device))
            mask = torch.zeros(seen.shape, device=device)
            self._masks[reach] = mask.masked_fill_(~seen, float("-inf"))
        return self._masks[reach]


def _stored_runs(blocks: list[Block], lengths: list[int], gap_rows: int) -> tuple[list[StoredRun], list[int]]:
    """The runs that hold the first rows of each block, and where among their rows each block begins.

    Blocks that are at most `gap_rows` rows apart form one run: a second copy would cost more than the rows between
    them.
    """
    runs: list[StoredRun] = []
    firsts, before = [], 0
    for block, length in zip(blocks, lengths, strict=True):
        last = runs[-1] if runs else None
        if last is not None and 0 <= block.first - last.end <= gap_rows:
            runs[-1] = StoredRun(last.first, block.first + length)
        else:
            before += last.end - last.first if last is not None else 0
            runs.append(StoredRun(block.first, block.first + length))
        firsts.append(before + block.first - runs[-1].first)
    return runs, firsts
