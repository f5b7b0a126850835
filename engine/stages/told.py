"""Encodes a scheduled sweep as numbers: its rows, and where their keys, values and states are stored."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.memory.tiers import TIERS
from engine.planning.limits import Limits
from engine.schedule.block import Block
from engine.schedule.segment import Segment
from engine.schedule.sequence import Prefix, Span

_NONE = -1
_LIMITS = ("rows_per_batch", "cached_rows_per_batch", "waiting_rows", "most_states")


@dataclass(frozen=True, kw_only=True)
class Told:
    """A sweep as scheduled by the leading stage."""

    lane: int
    """The lane whose sequences it computes."""
    rows: tuple[int, ...]
    """Rows of the tables of keys and values, by tier."""
    slots: tuple[int, ...]
    """Slots of the tables of states, by tier."""
    limits: Mapping[str, int]
    """Those that become smaller where memory runs out, by name: how micro-batches are put together."""
    batches: list[list[Segment]]
    """Micro-batches. Their spans hold only what layers need: tokens not computed in this sweep are zeros."""

    @classmethod
    def of(
        cls,
        lane: int,
        rows: tuple[int, ...],
        slots: tuple[int, ...],
        limits: Limits,
        batches: list[list[Segment]],
    ) -> Told:
        """What is told of a sweep that was scheduled within these limits."""
        told = {name: int(getattr(limits, name)) for name in _LIMITS}
        return cls(lane=lane, rows=rows, slots=slots, limits=told, batches=batches)

    def within(self, limits: Limits) -> Limits:
        """The limits of the sweep, where these were planned."""
        told: dict[str, Any] = {**self.limits}
        return replace(limits, **told)

    def numbers(self) -> torch.Tensor:
        """Encode everything as int64, on the host."""
        spans: dict[int, int] = {}
        out = array("q")
        for segment in (segment for batch in self.batches for segment in batch):
            for span in (*segment.span.chain, segment.span):
                if id(span) not in spans:
                    spans[id(span)] = len(spans)
                    out.extend(_numbers_of(span, spans))
        limits = (self.limits[name] for name in _LIMITS)
        out = array("q", (self.lane, *self.rows, *self.slots, *limits, len(spans), len(self.batches))) + out
        for batch in self.batches:
            out.append(len(batch))
            for each in batch:
                place = (each.num_rows, each.num_pad, each.first, each.lead, each.past)
                out.extend((spans[id(each.span)], *place, *each.tokens))
        return torch.frombuffer(out, dtype=torch.int64)

    @classmethod
    def read(cls, numbers: torch.Tensor) -> Told:
        """Decode what `numbers` returned."""
        given = iter(numbers.tolist())
        lane = next(given)
        rows, slots = (tuple(next(given) for _ in TIERS) for _ in range(2))
        limits = {name: next(given) for name in _LIMITS}
        num_spans, num_batches = next(given), next(given)
        spans: list[Span] = []
        for _ in range(num_spans):
            spans.append(_span_of(given, spans))
        batches = [[_segment_of(given, spans) for _ in range(next(given))] for _ in range(num_batches)]
        return cls(lane=lane, rows=rows, slots=slots, limits=limits, batches=batches)


def _numbers_of(span: Span, known: dict[int, int]) -> Sequence[int]:
    parent = _NONE if span.parent is None else known[id(span.parent)]
    block = span.block
    place = (_NONE, 0, 0, _NONE)
    if block is not None:
        slot = _NONE if block.slot is None else block.slot
        place = (TIERS.index(block.tier), block.first, block.num_rows, slot)
    return (isinstance(span, Prefix), parent, len(span.tokens), *place)


def _span_of(given: Iterator[int], known: Sequence[Span]) -> Span:
    is_prefix, parent, length, tier, first, num_rows, slot = (next(given) for _ in range(7))
    before = known[parent] if parent != _NONE else None
    assert before is None or isinstance(before, Prefix)
    span = (Prefix if is_prefix else Span)(tokens=[0] * length, parent=before, cached=length)
    if tier != _NONE:
        span.block = Block(TIERS[tier], first, num_rows, None if slot == _NONE else slot)
    return span


def _segment_of(given: Iterator[int], spans: Sequence[Span]) -> Segment:
    number, num_rows, num_pad, first, lead, past = (next(given) for _ in range(6))
    span = spans[number]
    span.cached, span.tokens[past:] = past, [next(given) for _ in range(num_rows)]
    return Segment(span, num_rows, num_pad=num_pad, first=first, lead=lead)
