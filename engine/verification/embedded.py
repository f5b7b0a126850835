"""The engine's micro-batches of known texts, embedded: what a layer is called with, and how the engine computes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.batch.micro_batch import MicroBatch
from engine.batch.step_batch import StepBatch
from engine.model.causal_model import CausalModel
from engine.model.padded import PaddedBatch
from engine.model.replayed.steps import Steps
from engine.model.stub import LayerCall
from engine.verification.replay import KINDS, BatchRows, Step


@dataclass(frozen=True)
class EmbeddedBatch:
    """A micro-batch, the calls of its layers, and its rows of the tables."""

    batch: MicroBatch | PaddedBatch | StepBatch
    calls: list[LayerCall]
    rows: BatchRows

    def through(
        self, layer: int, before: torch.Tensor, model: CausalModel, steps: Steps
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states after a layer, and the kind of each real row, now that it is known how it is computed.

        steps: what replays this layer alone.
        """
        if isinstance(self.batch, StepBatch):
            num_replays = steps.num_replays
            after = steps.through(self.batch, before, self.calls)
            is_replayed = steps.num_replays > num_replays
            kinds = self.rows.kinds
            return after, torch.full_like(kinds, KINDS.index("replayed")) if is_replayed else kinds
        model.sweeping.batch, model.sweeping.layer = self.batch, layer
        with model.sweeping.around_layer():
            return model.layer(layer, before, self.calls[layer]), self.rows.kinds


@dataclass(frozen=True)
class EmbeddedSweep:
    """A sweep whose micro-batches are embedded."""

    step: Step
    batches: Sequence[EmbeddedBatch]
