"""A micro-batch: packed rows of several spans, and what its attention needs to know of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import torch

from engine.memory.layout import Tier
from engine.schedule.scheduler import Limits, Segment
from engine.schedule.sequence import Prefix

if TYPE_CHECKING:
    from engine.schedule.block import Block

_MASKED_ROWS = 256
"""Rows of own tokens that one masked attention call over a shared prefix takes at least: they attend to each other in
vain, so their number is kept near the prefix's length."""


class PrefillGroup:
    """Neighbouring segments of new spans that continue the same chain of prefixes (or none)."""

    def __init__(self, segments: list[Segment], device: torch.device, chain: tuple[Prefix, ...]) -> None:
        self.chain = chain
        """The prefixes that its mask covers, too."""
        self.first, self.end = segments[0].first, segments[-1].end
        sizes = {segment.end - segment.first for segment in segments}
        self.num_parts = 1 if self.chain or len(sizes) > 1 else len(segments)
        """Parts of equal length that attend to nothing of each other; in a single part, the mask sees to that."""
        self._device = device
        self._segments = segments if self.num_parts == 1 else segments[:1]
        self.is_causal = not self.chain and len(self._segments) == 1
        """Whether all that its mask hides are later rows."""
        self._masks: dict[tuple[int | None, torch.dtype, int], torch.Tensor] = {}

    def mask(self, window: int | None, dtype: torch.dtype, copies: int) -> torch.Tensor:
        """What to add to the scores of a part, 0 or -inf: `[copies * rows, prefix + rows]`, a copy per query group."""
        key = window, dtype, copies
        if key not in self._masks:
            self._masks[key] = self._make_mask(window, dtype).repeat(copies, 1)
        return self._masks[key]

    def _make_mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        # Order counts padding on, so that real rows, which come first, never see it.
        start = sum(len(prefix.tokens) for prefix in self.chain)
        sizes = [segment.num_rows + segment.num_pad for segment in self._segments]
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        order = torch.cat([torch.arange(start, start + size) for size in sizes])
        key_owner = torch.cat((torch.full((start,), -1), owner))
        key_order = torch.cat((torch.arange(start), order))
        seen = ((key_owner == -1) | (key_owner == owner[:, None])) & (key_order <= order[:, None])
        if window is not None:
            seen &= order[:, None] - key_order < window
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
        return mask.to(self._device)


@dataclass(frozen=True)
class StoredRun:
    """Neighbouring rows of a table that are brought to the device at once, with what lies between blocks."""

    first: int
    end: int


@dataclass(frozen=True, eq=False)
class Scatter:
    """Rows of a micro-batch that go to single rows of the host's table."""

    rows: torch.Tensor | None
    """`[stored]`, on the device; None for all, in their order."""
    slots: torch.Tensor
    """`[stored]`, on the host."""


class DecodeGroup:
    """New rows of running sequences, equally many of each, that continue the same chain of prefixes (or none)."""

    def __init__(self, segments: list[Segment], device: torch.device, gap_rows: int = 0) -> None:
        self.chain: tuple[Prefix, ...] = segments[0].span.chain
        self.segments = segments
        self.first, self.end = segments[0].first, segments[-1].end
        self.steps = segments[0].num_rows
        """New rows of each sequence: its last token, and what is drafted to follow."""
        past = torch.tensor([segment.past for segment in segments])
        self.length = int(past.max()) + self.steps
        self.past = past.to(device)
        self.own_lengths = (past + self.steps).to(device, torch.int32)
        borders = torch.arange(len(segments) + 1, dtype=torch.int32)
        self.row_borders = (borders * self.steps).to(device)
        """Where each sequence's queries begin: int32 `[sequences + 1]`."""
        blocks = [segment.span.block for segment in segments if segment.span.block is not None]
        self.tier: Tier = blocks[0].tier
        """Where all own tokens are."""
        self.stored_runs: list[StoredRun] = []
        """Rows of its table, if not on the device, that hold the own tokens and room for the new ones: staged rows are
        these, one behind the other."""
        firsts = [block.first for block in blocks]
        if not self.is_on_device:
            self.stored_runs, firsts = _stored_runs(
                blocks, [segment.past + self.steps for segment in segments], gap_rows
            )
        self.own_borders = torch.tensor([*firsts, firsts[-1]], dtype=torch.int32).to(device)
        """Where each sequence's own tokens begin, in the device's table or among the staged rows: int32
        `[sequences + 1]`."""
        self._start = segments[0].span.start
        self._masks: dict[int | None, torch.Tensor] = {}

    @property
    def is_on_device(self) -> bool:
        """Whether all own tokens are in the device's table."""
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
        """The same of the new rows only, `[sequences * steps]`."""
        new = self.past[:, None] + torch.arange(self.steps, device=self.past.device)
        return (self.own_borders[:-1, None] + new).flatten()

    @cached_property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first row of each sequence in its table, and how many it has with the new ones: int64 on the host."""
        spots = [(s.span.block.first, s.past + self.steps) for s in self.segments if s.span.block is not None]
        firsts, lengths = torch.tensor(spots).T.contiguous()
        return firsts, lengths

    def mask(self, window: int | None) -> torch.Tensor:
        """What to add to the scores, 0 or -inf: float32 `[sequences, steps, prefix + length]`."""
        if window not in self._masks:
            device = self.past.device
            past = (self.past[:, None] + torch.arange(self.steps, device=device))[:, :, None]
            own = torch.arange(self.length, device=device)
            seen = own <= past
            prefix = torch.arange(self._start, device=device)
            seen_prefix = torch.ones(*past.shape[:2], self._start, dtype=torch.bool, device=device)
            if window is not None:
                seen &= past - own < window
                seen_prefix &= self._start + past - prefix < window
            seen = torch.cat((seen_prefix, seen), dim=2)
            mask = torch.zeros(seen.shape, device=device)
            self._masks[window] = mask.masked_fill_(~seen, float("-inf"))
        return self._masks[window]


class Rows:
    """Rows of a micro-batch, and where their keys and values are to be kept."""

    def __init__(self, segments: list[Segment], device: torch.device) -> None:
        self.segments = segments
        self.num_rows = segments[-1].end
        self.offloaded: list[tuple[Segment, Block]] = []
        """New spans whose keys and values go to the host, and all that go to disk."""
        self.scattered: Scatter | None = None
        """Rows of decode steps that go to the host."""
        self.passing: list[Segment] = []
        """Prefixes whose keys and values nobody needs beyond the layer in hand."""
        self.device_rows: torch.Tensor | None = None
        """Rows whose keys and values stay on the device `[stored]`; None for all, in their order."""
        self.device_slots: torch.Tensor | None = None
        """Where those are kept `[stored]`; None if no row is."""
        rows: list[torch.Tensor] = []
        slots: list[torch.Tensor] = []
        steps: list[tuple[Segment, Block]] = []
        for segment in self.segments:
            block = segment.span.block
            if block is None:
                if isinstance(segment.span, Prefix):
                    self.passing.append(segment)
                continue
            if block.tier != "device":
                (steps if segment.is_decode and block.tier == "host" else self.offloaded).append((segment, block))
                continue
            rows.append(torch.arange(segment.first, segment.first + segment.num_rows))
            first = block.first + segment.past
            slots.append(torch.arange(first, first + segment.num_rows))
        if rows:
            taken = torch.cat(rows)
            self.device_rows = None if len(taken) == self.num_rows else taken.to(device)
            self.device_slots = torch.cat(slots).to(device)
        if steps:
            taken = torch.cat([torch.arange(s.first, s.first + s.num_rows) for s, _ in steps])
            slots_there = torch.cat([torch.arange(s.num_rows) + block.first + s.past for s, block in steps])
            self.scattered = Scatter(None if len(taken) == self.num_rows else taken.to(device), slots_there)


class MicroBatch(Rows):
    """Rows of `segments`, one behind the other, each with its padding."""

    def __init__(self, segments: list[Segment], device: torch.device, limits: Limits) -> None:
        super().__init__(segments, device)
        ids: list[int] = []
        positions: list[int] = []
        for segment in segments:
            span, last = segment.span, segment.past + segment.num_rows
            ids += segment.tokens + [0] * segment.num_pad
            positions += range(span.start + segment.past, span.start + last)
            positions += [span.start + last - 1] * segment.num_pad  # stays inside the model's window
        self.ids = torch.tensor([ids])
        """`[1, rows]`, on the host."""
        self._positions = torch.tensor([positions]).to(device)
        self._device = device
        decode = [segment for segment in segments if segment.is_decode]
        self.decode_groups = [
            DecodeGroup(group, device, limits.gap_rows)
            for run in _runs_of_one_chain(decode)
            for group in _gathered_at_once(run, limits)
        ]
        self.prefill_first = sum(segment.num_rows for segment in decode)
        """First row that is no decode step."""
        borders = [segment.first for segment in segments[len(decode) :]] + [self.num_rows]
        borders = [border - self.prefill_first for border in borders]
        self.prefill_borders = torch.tensor(borders, dtype=torch.int32).to(device)
        """Where the new spans begin, counted from the first: int32 `[spans + 1]`."""
        self.longest_prefill = max((b - a for a, b in pairwise(borders)), default=0)
        self.longest = max(positions) + 1
        """Tokens of the longest context."""
        self.chain_runs = [
            (run[0].first, run[-1].end, run[0].span.chain)
            for run in _runs_of_one_chain(segments)
            if run[0].span.parent is not None
        ]
        """(first row, end row, prefixes) of neighbours that continue the same chain."""

    @cached_property
    def prefill_groups(self) -> list[PrefillGroup]:
        """New spans, for an attention that sees prefixes and own tokens at once."""
        runs = _runs_of_new_spans(self.segments, _shares_mask_with_prefixes)
        return [PrefillGroup(run, self._device, run[0].span.chain) for run in runs]

    @cached_property
    def own_groups(self) -> list[PrefillGroup]:
        """New spans, for an attention to their own tokens only."""
        runs = _runs_of_new_spans(self.segments, _shares_own_mask)
        return [PrefillGroup(run, self._device, ()) for run in runs]

    def inputs(self) -> dict[str, Any]:
        """What the model's forward is called with."""
        ids = self.ids.to(self._positions.device)
        return {"input_ids": ids, "position_ids": self._positions, "use_cache": False}

    def decode_group_at(self, row: int) -> DecodeGroup | None:
        """The decode group that a row belongs to, if it is a decode step."""
        return next((group for group in self.decode_groups if group.first <= row < group.end), None)


def _runs_of_one_chain(segments: list[Segment]) -> list[list[Segment]]:
    """Neighbours of the same chain; decode steps apart from new spans, by their numbers of rows, and by their place."""

    def kind(segment: Segment) -> tuple[Any, ...]:
        return id(segment.span.parent), *((segment.num_rows, segment.tier) if segment.is_decode else ())

    return [list(run) for _, run in groupby(segments, key=kind)]


def _stored_runs(blocks: list[Block], lengths: list[int], gap_rows: int) -> tuple[list[StoredRun], list[int]]:
    """The runs that hold the first rows of each block, and where among their rows each block begins.

    A copy of its own costs more than that of `gap_rows` rows: neighbours that lie so near are one run.
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


def _gathered_at_once(run: list[Segment], limits: Limits) -> list[list[Segment]]:
    """Cut decode steps of one kind so that what attention gathers of each part stays within limits."""
    if run[0].is_on_device and limits.reads_in_place:
        return [run]
    # Of a prefix, only the kernels that read in place tell what merging the two parts takes.
    if run[0].tier == "host" and limits.reads_on_host and (limits.reads_in_place or run[0].span.parent is None):
        return [run]
    parts: list[list[Segment]] = []
    longest = staged = end = 0
    for segment in run:
        length, block = segment.past + segment.num_rows, segment.span.block
        assert block is not None
        gap = block.first - end if not run[0].is_on_device and 0 <= block.first - end <= limits.gap_rows else 0
        longest, staged = max(longest, length), staged + gap + length
        # All may be padded to the longest; what lies between blocks is staged, too.
        if not parts or max(longest * (len(parts[-1]) + 1), staged) > limits.cached_rows_per_batch:
            parts.append([])
            longest = staged = length
        parts[-1].append(segment)
        end = block.first + length
    return parts


def _runs_of_new_spans(segments: list[Segment], joins: Callable[[list[Segment], Segment], bool]) -> list[list[Segment]]:
    """Neighbouring new segments that one attention call takes, as far as each `joins` those before it."""
    runs: list[list[Segment]] = []
    for segment in (segment for segment in segments if not segment.is_decode):
        if runs and joins(runs[-1], segment):
            runs[-1].append(segment)
        else:
            runs.append([segment])
    return runs


def _shares_mask_with_prefixes(run: list[Segment], segment: Segment) -> bool:
    """Whether `segment` continues the same chain, under a mask of limited size; without a chain: is as long."""
    last = run[-1]
    if last.span.parent is not segment.span.parent:
        return False
    if segment.span.parent is None:
        return segment.end - segment.first == last.end - last.first
    return segment.end - run[0].first <= max(_MASKED_ROWS, segment.span.start)


def _shares_own_mask(run: list[Segment], segment: Segment) -> bool:
    """Whether a mask over own tokens alone stays of limited size."""
    return segment.end - run[0].first <= _MASKED_ROWS
