"""The sweeps that the engine runs over known texts, as its own scheduler cuts them, for computation layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from engine.batch.micro_batch import MicroBatch
from engine.batch.rows import Rows
from engine.batch.step_batch import StepBatch
from engine.model.causal_model import CausalModel
from engine.model.padded import PaddedBatch
from engine.model.replayed.steps import Steps
from engine.planning.limits import Limits
from engine.schedule.block import Block
from engine.schedule.cache_room import CacheRoom
from engine.schedule.scheduler import Scheduler
from engine.schedule.segment import Segment
from engine.schedule.sequence import Prefix, Span
from engine.verification.text import KnownSequence, Text

KINDS = ("prefix", "prompt", "decode", "replayed")
"""The kinds of rows by the way in which the engine computes them; the last are decode steps, too."""


@dataclass(frozen=True)
class Step:
    """One sweep: its micro-batches, and the cache blocks of the spans that it reads and writes."""

    batches: Sequence[MicroBatch | PaddedBatch | StepBatch]
    rooms: Sequence[tuple[Span, Block | None]]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the step's spans have the cache blocks that they had when it was scheduled."""
        before = [(span, span.block) for span, _ in self.rooms]
        for span, block in self.rooms:
            span.block = block
        try:
            yield
        finally:
            for span, block in before:
                span.block = block


@dataclass(frozen=True)
class BatchRows:
    """The table rows of the rows of a micro-batch."""

    table: torch.Tensor
    """Rows of a table of hidden states, int64 `[rows]`, on the table's device; padding repeats the adjacent real
    row."""
    real: torch.Tensor | None
    """The rows that are not padding, int64 on the device; None if all are."""
    kinds: torch.Tensor
    """The kind of each real row, as a number in `KINDS`: int64 on the device."""


@dataclass(frozen=True)
class Replay:
    """All sweeps over texts whose tokens are known; in each layer, a sweep sees only what the ones before wrote."""

    sequences: list[KnownSequence]
    """One sequence of each text, in order."""
    steps: list[Step]


def replay(
    texts: Iterable[Text],
    model: CausalModel,
    replayed: Steps,
    planned: Limits,
    limits: Limits,
    room: CacheRoom,
    *,
    share_prefix: bool,
) -> Replay:
    """Schedule texts as the engine does, up to their ends; all cache blocks are freed before this returns.

    `limits` are those of the running engine; where they are smaller than `planned`, memory ran short, and longer
    prompts are computed in pieces here, too. Blocks are reused in the order of the sweeps, so each layer must be
    computed sweep by sweep in one go. Raises the error of a text for which the cache has no space.
    """
    sequences = [KnownSequence.of_text(text) for text in texts]
    scheduler = Scheduler(planned, room, share_prefix=share_prefix)
    scheduler.limits = limits
    scheduler.add(sequences)
    steps: list[Step] = []
    try:
        while not scheduler.is_idle:
            cut = scheduler.next_sweep()
            for failed in scheduler.take_failed():
                assert failed.error is not None
                raise failed.error
            steps.append(_step(cut, model, replayed, limits))
            for segment in (segment for batch in cut for segment in batch):
                _advance(segment)
            scheduler.finish([each for each in scheduler.running if isinstance(each, KnownSequence) and each.is_told])
    finally:
        scheduler.drop(sequences)
    return Replay(sequences, steps)


def _step(cut: list[list[Segment]], model: CausalModel, replayed: Steps, limits: Limits) -> Step:
    spans: dict[int, Span] = {}
    for segment in (segment for batch in cut for segment in batch):
        spans.update({id(span): span for span in (*segment.span.chain, segment.span)})
    return Step(
        [_batch(segments, model, replayed, limits) for segments in cut],
        [(span, span.block) for span in spans.values()],
    )


def _batch(
    segments: list[Segment], model: CausalModel, replayed: Steps, limits: Limits
) -> MicroBatch | PaddedBatch | StepBatch:
    if model.is_padded:
        return PaddedBatch(segments, model.device, model.sweeping, limits.most_states)
    return replayed.take(segments) or MicroBatch(segments, model.device, limits)


def _advance(segment: Segment) -> None:
    segment.span.cached += segment.num_rows
    if isinstance(segment.span, KnownSequence):
        segment.span.advance(1 + len(segment.draft))


def rows_of(
    batch: Rows, first_row: Mapping[int, int], *, device: torch.device, table_device: torch.device
) -> BatchRows:
    """The table rows of a micro-batch; `first_row` is the first row of each span, by its identity."""
    rows = torch.empty(batch.num_rows, dtype=torch.long)
    kinds = torch.full((batch.num_rows,), -1)
    for segment in batch.segments:
        first, end = segment.first, segment.first + segment.num_rows
        begin = first_row[id(segment.span)] + segment.past
        rows[segment.begin : first] = begin
        rows[first:end] = torch.arange(begin, begin + segment.num_rows)
        rows[end : segment.end] = begin + segment.num_rows - 1
        kinds[first:end] = KINDS.index(_kind(segment))
    rows[batch.segments[-1].end :] = rows[batch.segments[-1].end - 1]  # copies of the last row
    real = (kinds >= 0).nonzero()[:, 0]
    return BatchRows(
        rows.to(table_device), None if len(real) == len(kinds) else real.to(device), kinds[real].to(device)
    )


def _kind(segment: Segment) -> str:
    return "decode" if segment.is_decode else "prefix" if isinstance(segment.span, Prefix) else "prompt"
