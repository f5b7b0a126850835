"""Chooses which micro-batches are replayed, and holds the recordings of their shapes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from engine.batch.step_batch import StepBatch, StepShape
from engine.cache.key_value import KVCache
from engine.errors import named
from engine.memory import accelerator
from engine.model.causal_model import CausalModel
from engine.model.replayed.arguments import Arguments
from engine.model.replayed.recording import Recording
from engine.model.stub import LayerCall
from engine.schedule.segment import Segment
from engine.schedule.turns import are_steps

_MOST_RECORDINGS = 32


class Steps:
    """Takes decode steps through all layers at once: the first micro-batch of a shape directly, later ones by replay.

    It is for models whose weights are all on the device and not encoded, with layers that use our attention function.
    """

    def __init__(self, model: CausalModel, cache: KVCache, *, is_wanted: bool) -> None:
        self._model, self._cache = model, cache
        self._is_wanted = is_wanted
        self._layers = range(len(model.layers))
        self._recordings: OrderedDict[StepShape, Recording | None] = OrderedDict()
        """The recordings by shape; None for a shape that was computed once."""
        self._places: list[int] = []
        """The addresses of the cache's tables when the recordings were made."""
        self._recorder: accelerator.Recorder | None = None
        self.refusal: str | None = None
        """Why nothing more is recorded; None while nothing failed."""
        self.num_replays = 0

    def take(self, segments: list[Segment]) -> StepBatch | None:
        """The micro-batch of `segments`, if it can be run here."""
        if not self._is_wanted or self.refusal is not None or not are_steps(segments):
            return None
        return StepBatch(segments, self._model.device)

    def run(self, batch: StepBatch) -> torch.Tensor:
        """The hidden states `[steps, width]` after the last layer; weights must be loaded, embeddings looked up."""
        hidden, calls = self._model.record(batch.inputs())
        return self.through(batch, hidden, calls)[: batch.num_steps]

    def through(self, batch: StepBatch, hidden: torch.Tensor, calls: Sequence[LayerCall]) -> torch.Tensor:
        """The hidden states `[rows, width]` after the last of the layers, replayed where there is a recording."""
        found = self._replayed(batch, hidden, calls)
        return self._computed(batch, hidden, calls) if found is None else found

    def _replayed(self, batch: StepBatch, hidden: torch.Tensor, calls: Sequence[LayerCall]) -> torch.Tensor | None:
        """The result of a replay; None where there is no recording, yet or at all."""
        if self.refusal is not None:  # since this sweep began
            return None
        if (places := self._cache.device_places()) != self._places:
            self._places = places
            self._recordings.clear()
        is_known = batch.shape in self._recordings
        recording = self._recordings.pop(batch.shape, None)
        try:
            arguments = Arguments(calls, hidden.device)
            if recording is None and is_known:
                recording = self._recorded(batch, hidden, arguments)
            elif recording is not None and not recording.fits(arguments):
                recording = None
        except Exception as error:  # what is no fault of recording is raised by what is computed without it
            self.forget(named(error))
            return None
        self._recordings[batch.shape] = recording
        if len(self._recordings) > _MOST_RECORDINGS:
            self._recordings.popitem(last=False)
        if recording is None:
            return None
        self.num_replays += 1
        return recording.run(batch, hidden, arguments)

    def _recorded(self, batch: StepBatch, hidden: torch.Tensor, arguments: Arguments) -> Recording:
        try:
            self._recorder = self._recorder or accelerator.Recorder(hidden.device)
            return Recording(batch, hidden, arguments, self._computed, self._recorder)
        except Exception as error:
            if not accelerator.is_out_of_memory(error):
                raise
        accelerator.release_memory(hidden.device)  # torch does not do so by itself while it records
        self._recorder = self._recorder or accelerator.Recorder(hidden.device)
        return Recording(batch, hidden, arguments, self._computed, self._recorder)

    @contextmanager
    def of_layers(self, layers: range) -> Iterator[None]:
        """Inside, `through` takes micro-batches through these layers only; all recordings are made anew."""
        before, self._layers = self._layers, layers
        self._recordings.clear()
        try:
            yield
        finally:
            self._layers = before
            self._recordings.clear()

    def clear(self) -> None:
        """Release all recordings and their memory."""
        self._recordings.clear()
        self._recorder = None

    def forget(self, reason: str) -> None:
        """Release all recordings, and make no more."""
        self.clear()
        self.refusal = reason

    def _computed(self, batch: StepBatch, hidden: torch.Tensor, calls: Sequence[LayerCall]) -> torch.Tensor:
        sweeping = self._model.sweeping
        sweeping.batch = batch
        for layer in self._layers:
            sweeping.layer = layer
            hidden = self._model.layer(layer, hidden, calls[layer])
        return hidden
