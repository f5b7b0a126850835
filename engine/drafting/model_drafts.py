"""Drafts tokens with a small model for the decode steps of a sweep, as many as are worth their time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from engine.drafting.pace import MOST_DRAFTED, Pace
from engine.drafting.shadows import Shadow, Shadows
from engine.memory import accelerator
from engine.planning.limits import Limits
from engine.schedule.cutting import packed_batches, rectangular_batches, rows_of
from engine.schedule.segment import Segment, add_drafts
from engine.schedule.sequence import Sequence

_log = logging.getLogger(__name__)


class Computes(Protocol):
    """The interface of an executor that takes micro-batches through a model."""

    reads: Callable[[list[Segment], torch.Tensor], None] | None
    """Is called with the output of the last layer for each micro-batch `[rows, width]`."""

    def choices(self, batches: list[list[Segment]]) -> dict[int, int]:
        """Compute every segment; return the token chosen after the last row of each, by the id() of its span."""

    def recover(self) -> None:
        """Make the executor usable again after an error."""

    def close(self) -> None:
        """Release keys and values."""


class ModelDrafts:
    """Drafts by a small model, which keeps a shadow (its own copy) of each sequence it drafts for.

    A sequence whose shadow has no room in the draft's cache, or is longer than its window, gets no drafts.
    """

    def __init__(
        self,
        executor: Computes,
        shadows: Shadows,
        limits: Limits,
        *,
        device: torch.device,
        window: int | None,
        vocabularies: tuple[int, int],
        is_ready: Callable[[], bool],
    ) -> None:
        """vocabularies: the vocabulary sizes of draft and model. is_ready: whether the draft's weights are loaded."""
        self.pace = Pace()
        self.num_came = 0
        """The number of drafted tokens that were accepted so far."""
        self.num_tried = 0
        """The number of drafted tokens that were checked so far."""
        self._executor, self._limits, self._device = executor, limits, device
        self._window = window
        self._own_vocabulary, self._vocabulary = vocabularies
        self._is_ready = is_ready
        self._shadows = shadows

    def swept(self, rows: int, seconds: float) -> None:
        """Note the time of a sweep of the model whose weights were loaded already."""
        self.pace.sweeps.add(rows, seconds)

    def add(self, segments: Collection[Segment], rows: int, limits: Limits) -> None:
        """Add drafts to the decode steps of a sweep of so many rows; steps without one get earlier continuations."""
        steps = {id(each.span): each for each in segments if each.is_decode and isinstance(each.span, Sequence)}
        self._settle(steps)
        targets = [each.span for each in steps.values() if isinstance(each.span, Sequence) and each.span.most_drafted]
        size = self.pace.size(len(targets), rows) if targets and self._is_ready() else 0
        if self.pace.is_paused:
            self._shadows.clear()
        if size:
            for shadow, draft in self._drafted(targets, size):
                segment = steps[id(shadow.target)]
                if draft and rows + len(draft) <= limits.rows_per_sweep:
                    segment.draft, shadow.proposed = draft, draft
                    segment.num_rows += len(draft)
                    rows += len(draft)
        add_drafts(segments, rows, limits)

    def _settle(self, running: dict[int, Segment]) -> None:
        """Count the accepted drafts, and drop the shadows of sequences that no longer run."""
        for shadow in self._shadows:
            found = shadow.settle()
            if found is not None:
                self.pace.checked(*found)
                self.num_came, self.num_tried = self.num_came + found[0], self.num_tried + found[1]
            if found is None or id(shadow.target) not in running:
                self._shadows.drop(shadow)

    def _drafted(self, targets: list[Sequence], size: int) -> list[tuple[Shadow, tuple[int, ...]]]:
        """The drafts of each sequence that has a shadow: at most `size` tokens."""
        found: list[tuple[Shadow, tuple[int, ...]]] = []
        with self._within_memory():
            found = self._rounds(targets, size)
        return found

    @contextmanager
    def _within_memory(self) -> Iterator[None]:
        """Inside, drafting is given up for some sweeps where the device runs out of memory."""
        try:
            yield
            return
        except Exception as error:
            if not accelerator.is_out_of_memory(error):
                raise
        _log.info("flexgen-helm: the draft model ran out of device memory; it pauses for some sweeps")
        self._executor.recover()
        self._shadows.clear()
        self.pace.give_up()
        accelerator.release_memory(self._device)

    def _rounds(self, targets: list[Sequence], size: int) -> list[tuple[Shadow, tuple[int, ...]]]:
        most: dict[int, int] = {}
        segments: list[Segment] = []
        drafting: list[Shadow] = []
        for target in targets[: self.pace.most_sequences(len(targets))]:
            count = min(size, target.most_drafted, self._room_in_window(target))
            found = self._first_rows(target, len(targets), size) if count > 0 else None
            shadow = self._shadows.get(target)
            if found is not None and shadow is not None:
                most[id(shadow)] = count
                drafting.append(shadow)
                segments += found
        drafts: dict[int, list[int]] = {id(shadow): [] for shadow in drafting}
        asked = drafting
        while segments:
            chosen = self._compute(segments)
            for shadow in asked:
                if chosen[id(shadow)] >= self._vocabulary:  # rows that a table is filled up with
                    most[id(shadow)] = 0
                else:
                    drafts[id(shadow)].append(chosen[id(shadow)])
                    shadow.take(chosen[id(shadow)])
            asked = [shadow for shadow in asked if len(drafts[id(shadow)]) < most[id(shadow)]]
            segments = [shadow.next_row() for shadow in asked]
        return [(shadow, tuple(drafts[id(shadow)])) for shadow in drafting]

    def _first_rows(self, target: Sequence, count: int, size: int) -> list[Segment] | None:
        """The rows that bring a sequence's shadow up to date; None if it gets no shadow."""
        shadow = self._shadows.get(target)
        if shadow is not None:
            step = shadow.step() if self._knows(target.tokens[-1:]) else None
            if step is not None:
                return [step]
            self._shadows.drop(shadow)
        spans = (*target.chain, target)
        left = target.job.max_new_tokens - len(target.generated)
        num_tokens = target.start + len(target.tokens)
        if not self.pace.pays_to_begin(num_tokens, left, count, size):
            return None
        return self._shadows.begin(target) if all(self._knows(span.tokens) for span in spans) else None

    def _room_in_window(self, target: Sequence) -> int:
        """The number of tokens that may be drafted within the draft model's window; the last of them is not fed."""
        return MOST_DRAFTED if self._window is None else self._window - target.start - len(target.tokens) + 1

    def _knows(self, tokens: list[int]) -> bool:
        """Whether the draft model's embedding has rows for these tokens."""
        return self._own_vocabulary >= self._vocabulary or max(tokens, default=0) < self._own_vocabulary

    def _compute(self, segments: list[Segment]) -> dict[int, int]:
        """Pass segments through the draft model, at most as many rows at once as its memory allows."""
        cut = rectangular_batches if self._limits.rectangular else packed_batches
        chosen: dict[int, int] = {}
        for part in _parts(segments, self._limits.rows_per_sweep):
            begun = time.perf_counter()
            chosen |= self._executor.choices(cut(part, self._limits))
            if any(isinstance(segment.span, Sequence) for segment in part):  # else nothing was waited for
                self.pace.steps.add(sum(segment.num_rows for segment in part), time.perf_counter() - begun)
            for segment in part:
                segment.span.cached += segment.num_rows
        return chosen

    def close(self) -> None:
        """Drop all shadows."""
        self._shadows.clear()
        self._executor.close()


def _parts(segments: list[Segment], most: int) -> list[list[Segment]]:
    """Split segments, in order, into parts of at most `most` rows; a larger segment is a part of its own."""
    parts: list[list[Segment]] = []
    rows = 0
    for segment in segments:
        rows += rows_of(segment)
        if not parts or rows > most:
            parts.append([])
            rows = rows_of(segment)
        parts[-1].append(segment)
    return parts
