"""A micro-batch: packed rows of several spans, and what its attention needs to know of them."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

import torch

from engine.batch.context_group import ContextGroup, context_groups
from engine.batch.decode_group import DecodeGroup
from engine.batch.prefill_group import PrefillGroup
from engine.batch.prefix_group import Chain, PrefixGroup, prefix_groups
from engine.batch.rows import Rows
from engine.memory import accelerator
from engine.planning.limits import Limits
from engine.schedule.segment import Segment
from engine.schedule.sequence import Prefix

_MASKED_ROWS = 256
"""The least number of own rows that one masked attention call over a shared prefix takes. The rows of a call also
attend to each other in vain (the mask discards it), so their number is kept near the prefix's length."""
_MASKED_OWN_ROWS = 128
"""The least number of own rows of one masked attention call without a prefix. A longer span has a call of its own,
which takes less time."""


class MicroBatch(Rows):
    """The rows of `segments`, concatenated, each segment with its padding."""

    def __init__(self, segments: list[Segment], device: torch.device, limits: Limits) -> None:
        super().__init__(segments, device, limits.most_states)
        ids: list[int] = []
        positions: list[torch.Tensor] = []
        for segment in segments:
            first, end = segment.span.start + segment.past, segment.span.start + segment.past + segment.num_rows
            ids += segment.tokens + [0] * segment.num_pad
            positions.append(torch.arange(first, end))
            if segment.num_pad:
                positions.append(torch.full((segment.num_pad,), end - 1))  # stays inside the model's window
        # By way of an array, and of ranges: torch takes ten times as long over a list of numbers.
        self.ids = torch.frombuffer(array("q", ids), dtype=torch.int64)[None]
        """The token ids `[1, rows]`, on the host."""
        self._positions = accelerator.sent(torch.cat(positions)[None], device)
        self._device = device
        self.most_gathered_rows = limits.cached_rows_per_batch
        """The most rows of keys and values that attention may gather at once."""
        self.most_score_bytes = limits.logits_bytes
        """The most bytes of attention scores, where attention is computed in blocks of rows."""
        self._most_prefix_rows = limits.rows_per_batch
        """The most rows of several prefixes that are gathered at once: about as many as there are new rows."""
        decode = [segment for segment in segments if segment.is_decode]
        decode_runs, new_runs = _runs_of_one_chain(decode), _runs_of_one_chain(segments[len(decode) :])
        self.decode_groups = [
            DecodeGroup(group, device, limits.gap_rows)
            for run in decode_runs
            for group in _gathered_at_once(run, limits)
        ]
        self.prefill_first = sum(segment.num_rows for segment in decode)
        """The first row that is not a decode step."""
        borders = [segment.first for segment in segments[len(decode) :]] + [self.num_rows]
        borders = [border - self.prefill_first for border in borders]
        self.prefill_borders = accelerator.sent(torch.tensor(borders, dtype=torch.int32), device)
        """The start of each new span, in rows from the first new one: int32 `[spans + 1]`."""
        self.longest_prefill = max((b - a for a, b in pairwise(borders)), default=0)
        self.longest = max(segment.span.start + segment.past + segment.num_rows for segment in segments)
        """The number of tokens of the longest context."""
        self._context_groups: dict[int | None, list[ContextGroup]] = {}
        self._new_runs = new_runs
        self.decode_chains = _chains(decode_runs)
        """(first row, end row, prefixes) of adjacent decode steps that continue the same chain."""
        self.prefill_chains = _chains(new_runs)
        """(first row, end row, prefixes) of adjacent new spans that continue the same chain."""

    @cached_property
    def prefill_groups(self) -> list[PrefillGroup]:
        """New spans in groups, for attention that takes prefixes and own tokens in one call."""
        runs = _runs_of_new_spans(self.segments, _shares_mask_with_prefixes)
        return [PrefillGroup(run, self._device, run[0].span.chain) for run in runs]

    @cached_property
    def own_groups(self) -> list[PrefillGroup]:
        """New spans in groups, for attention to their own tokens only."""
        runs = _runs_of_new_spans(self.segments, _shares_own_mask)
        return [PrefillGroup(run, self._device, ()) for run in runs]

    @cached_property
    def prefill_runs(self) -> list[tuple[list[int], tuple[Prefix, ...]]]:
        """Adjacent new spans that continue the same chain of prefixes (or none), and that chain.

        The spans are given as start offsets and the last end, in rows from the first new one.
        """
        first = self.prefill_first
        return [([*(s.first - first for s in run), run[-1].end - first], run[0].span.chain) for run in self._new_runs]

    @cached_property
    def decode_prefixes(self) -> list[PrefixGroup]:
        """The prefix chains of decode steps, for attention that takes several chains in one call."""
        return prefix_groups(self.decode_chains, self._device, self._most_prefix_rows)

    @cached_property
    def prefill_prefixes(self) -> list[PrefixGroup]:
        """The prefix chains of new spans, for attention that takes several chains in one call."""
        return prefix_groups(self.prefill_chains, self._device, self._most_prefix_rows)

    def context_groups(self, window: int | None) -> list[ContextGroup]:
        """New spans in groups, for attention to contexts that are gathered whole, as far as a window reaches."""
        if window not in self._context_groups:
            new = [segment for segment in self.segments if not segment.is_decode]
            self._context_groups[window] = context_groups(new, self._device, self.most_gathered_rows, window)
        return self._context_groups[window]

    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of the model's forward."""
        ids = accelerator.sent(self.ids, self._device)
        continued = [segment.continued for segment in self.segments if segment.continued is not None]
        given = {"continued": torch.cat(continued)[None]} if continued else {}
        return {"input_ids": ids, "position_ids": self._positions, "use_cache": False, **given}


def _chains(runs: list[list[Segment]]) -> list[Chain]:
    return [(run[0].first, run[-1].end, run[0].span.chain) for run in runs if run[0].span.parent is not None]


def _runs_of_one_chain(segments: list[Segment]) -> list[list[Segment]]:
    """Split segments into runs of one prefix chain; decode steps are also split by their number of rows and tier."""

    def kind(segment: Segment) -> tuple[Any, ...]:
        return id(segment.span.parent), *((segment.num_rows, segment.tier) if segment.is_decode else ())

    return [list(run) for _, run in groupby(segments, key=kind)]


def _gathered_at_once(run: list[Segment], limits: Limits) -> list[list[Segment]]:
    """Split decode steps of one kind so that the rows which attention gathers for each part stay within the limits."""
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
    """Group adjacent new segments for one attention call; `joins` says whether a segment fits those before it."""
    runs: list[list[Segment]] = []
    for segment in (segment for segment in segments if not segment.is_decode):
        if runs and joins(runs[-1], segment):
            runs[-1].append(segment)
        else:
            runs.append([segment])
    return runs


def _shares_mask_with_prefixes(run: list[Segment], segment: Segment) -> bool:
    """Whether `segment` has the same chain and the mask stays small; without a chain: whether it is equally long."""
    last = run[-1]
    if last.span.parent is not segment.span.parent:
        return False
    if segment.span.parent is None:
        return segment.end - segment.first == last.end - last.first
    return segment.end - run[0].first <= max(_MASKED_ROWS, segment.span.start)


def _shares_own_mask(run: list[Segment], segment: Segment) -> bool:
    """Whether a mask over own tokens alone stays small."""
    return segment.end - run[0].first <= _MASKED_OWN_ROWS
