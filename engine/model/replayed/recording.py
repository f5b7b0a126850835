"""All layers for decode steps of one shape, as one recording that the device replays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.batch.step_batch import StepBatch
from engine.memory import accelerator
from engine.model.replayed.arguments import Arguments
from engine.model.stub import LayerCall

Through = Callable[[StepBatch, torch.Tensor, Sequence[LayerCall]], torch.Tensor]
"""A function that takes hidden states `[rows, width]` of a micro-batch through all layers."""


class Recording:
    """The recorded work for one shape; the inputs of each step are copied into memory of this object."""

    def __init__(
        self,
        batch: StepBatch,
        hidden: torch.Tensor,
        arguments: Arguments,
        through: Through,
        recorder: accelerator.Recorder,
    ) -> None:
        """Record, without computing anything; a call of `through` before must have compiled the kernels.

        Raises `RuntimeError` where the model does what cannot be recorded.
        """
        self._batch = batch.copy()
        self._form = arguments.form
        self._hidden = hidden.clone()
        self._tensors = [tensor.clone() for tensor in arguments.tensors]
        calls = arguments.calls_with(self._tensors)
        self._replay, self._found = recorder.record(lambda: through(self._batch, self._hidden, calls))

    def fits(self, arguments: Arguments) -> bool:
        """Whether layers are called as they were recorded, except for the numbers in tensors."""
        return self._form == arguments.form

    def run(self, batch: StepBatch, hidden: torch.Tensor, arguments: Arguments) -> torch.Tensor:
        """The hidden states `[rows, width]` after the last layer, for a micro-batch of the same shape."""
        self._batch.take(batch)
        self._hidden.copy_(hidden)
        for here, tensor in zip(self._tensors, arguments.tensors, strict=True):
            here.copy_(tensor)
        self._replay()
        return self._found.clone()  # the next replay writes there
