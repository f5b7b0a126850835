"""Drafts by the MTP layer in the model's own checkpoint, which continues the model's output row by row."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from engine.drafting.head_shadows import HeadShadows
from engine.drafting.model_drafts import Computes, ModelDrafts
from engine.memory import accelerator
from engine.model.causal_model import CausalModel
from engine.planning.limits import Limits
from engine.schedule.segment import Segment
from engine.schedule.sequence import Sequence


class HeadDrafts(ModelDrafts):
    """Drafts by an MTP layer: the first token of each draft from the model's output, the others from its own."""

    def __init__(
        self,
        executor: Computes,
        shadows: HeadShadows,
        limits: Limits,
        *,
        target: CausalModel,
        window: int | None,
        is_ready: Callable[[], bool],
    ) -> None:
        """target: the model. is_ready: whether the layer's weights are loaded."""
        vocabularies = (target.vocab_size, target.vocab_size)
        super().__init__(
            executor,
            shadows,
            limits,
            device=target.device,
            window=window,
            vocabularies=vocabularies,
            is_ready=is_ready,
        )
        self._target, self._followed = target, shadows
        self._num_segments = 1
        """Of the latest sweep."""
        executor.reads = shadows.note

    def add(self, segments: Collection[Segment], rows: int, limits: Limits) -> None:
        """As in `ModelDrafts`, for a sweep whose output the layer will follow."""
        self._num_segments = max(1, len(segments))
        super().add(segments, rows, limits)

    def computed(self, segments: list[Segment], states: torch.Tensor) -> None:
        """Follow the model: states `[rows, width]` are the output of its last layer for a micro-batch.

        Rows of prompts are computed at once; those of decode steps when their tokens are chosen (`add`).
        """
        if self.pace.is_paused or not self._is_ready():
            return
        wanted = [segment for segment in segments if self._followed.is_followed(segment)]
        if not wanted:
            return
        rows = torch.cat([torch.arange(each.first, each.first + each.num_rows) for each in wanted])
        room = self._limits.rows_per_sweep - self._followed.num_kept
        with self._within_memory():
            with self._target.sweeping.arithmetic:
                normed = self._target.normed(states[accelerator.sent(rows, states.device)])
            new: list[Segment] = []
            for segment, part in zip(wanted, normed.split([each.num_rows for each in wanted]), strict=True):
                room -= segment.num_rows if segment.past else 1
                if room >= 0 and self._pays(segment):  # others are not followed any further
                    new += self._followed.follow(segment, part)
                elif not segment.past:
                    self._followed.forget(segment.span)
            if new and accelerator.has_streams(self._device):  # what the model still computes is not the layer's time
                accelerator.current_stream(self._device).synchronize()
            self._compute(new)

    def _pays(self, segment: Segment) -> bool:
        """Whether it is worth following a prompt; a prefix and what is followed always are."""
        if segment.past or not isinstance(segment.span, Sequence):
            return True
        left = segment.span.job.max_new_tokens
        return self.pace.pays_to_begin(segment.num_rows, left, self._num_segments, self.pace.last_size)

    def _settle(self, running: dict[int, Segment]) -> None:
        """As in `ModelDrafts`; prefixes leave with those of the model."""
        super()._settle(running)
        self._followed.tidy()
