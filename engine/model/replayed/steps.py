"""Which micro-batches are replayed, and the recordings of their shapes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from engine.batch.step_batch import StepBatch, StepShape, are_steps
from engine.cache.key_value import KVCache
from engine.errors import named
from engine.memory import accelerator
from engine.model.causal_model import CausalModel
from engine.model.replayed.arguments import Arguments
from engine.model.replayed.recording import Recording
from engine.model.stub import LayerCall
from engine.schedule.segment import Segment

_MOST_RECORDINGS = 32


class Steps:
    """Takes decode steps through all layers at once: a shape's first micro-batch as it is, from the second on replayed.

    For models all of whose weights lie on the device as numbers, and layers that our attention function serves.
    """

    def __init__(self, model: CausalModel, cache: KVCache, *, is_wanted: bool) -> None:
        self._model, self._cache = model, cache
        self._is_wanted = is_wanted
        self._recordings: OrderedDict[StepShape, Recording | None] = OrderedDict()
        """None for a shape that was computed once."""
        self._places: list[int] = []
        """Where the cache's tables were when these were made."""
        self._recorder = accelerator.Recorder(model.device) if is_wanted else None
        self.refusal: str | None = None
        """Why no more is recorded; None while nothing failed."""
        self.num_replays = 0

    def take(self, segments: list[Segment]) -> StepBatch | None:
        """The micro-batch of `segments`, if it is to be run here."""
        if not self._is_wanted or self.refusal is not None or not are_steps(segments):
            return None
        return StepBatch(segments, self._model.device)

    def run(self, batch: StepBatch) -> torch.Tensor:
        """Hidden states `[steps, width]` behind the last layer; weights must be in place, embeddings looked up."""
        hidden, calls = self._model.record(batch.inputs())
        return self._run(batch, hidden, calls)[: batch.num_steps]

    def _run(self, batch: StepBatch, hidden: torch.Tensor, calls: Sequence[LayerCall]) -> torch.Tensor:
        if (places := self._cache.device_places()) != self._places:
            self._places = places
            self._recordings.clear()
        is_known = batch.shape in self._recordings
        recording = self._recordings.pop(batch.shape, None)
        arguments = Arguments(calls)
        if recording is not None and not recording.fits(arguments):
            recording, is_known = None, False
        if recording is None and is_known:
            recording = self._record(batch, hidden, arguments)
        if self.refusal is None:
            self._recordings[batch.shape] = recording
        if len(self._recordings) > _MOST_RECORDINGS:
            self._recordings.popitem(last=False)
        if recording is None:
            return self._through(batch, hidden, calls)
        self.num_replays += 1
        return recording.run(batch, hidden, arguments)

    def _record(self, batch: StepBatch, hidden: torch.Tensor, arguments: Arguments) -> Recording | None:
        assert self._recorder is not None
        try:
            return Recording(batch, hidden, arguments, self._through, self._recorder)
        except Exception as error:  # what is no fault of the recording is raised by what is computed without it
            self.forget(named(error))
            return None

    def forget(self, reason: str) -> None:
        """Let go of all recordings and their memory, and make no more."""
        self._recordings.clear()
        self._recorder, self.refusal = None, reason

    def _through(self, batch: StepBatch, hidden: torch.Tensor, calls: Sequence[LayerCall]) -> torch.Tensor:
        sweeping = self._model.sweeping
        sweeping.batch = batch
        for layer, call in enumerate(calls):
            sweeping.layer = layer
            hidden = self._model.layer(layer, hidden, call)
        return hidden
