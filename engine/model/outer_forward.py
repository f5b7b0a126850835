"""A model's own forward, called with stubs for its layers: embeddings, and how each layer is called."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.model.attention.mask import noting_masks
from engine.model.padded import CacheView
from engine.model.probing.length_view import LengthView
from engine.model.probing.positions import Positions
from engine.model.stub import CallRecorder, LayerCall
from engine.model.sweep_context import SweepContext


class OuterForward:
    """Calls the part of a model around its decoder layers, which stubs replace."""

    def __init__(self, module: PreTrainedModel, recorder: CallRecorder, sweeping: SweepContext) -> None:
        self._recorder = recorder
        self._sweeping = sweeping
        self.called: nn.Module = module.base_model
        """The module whose forward is called: the model without its head."""
        if {*inspect.signature(self.called.forward).parameters} == {"args", "kwargs"}:  # no more than a wrapper
            self.called = module.get_decoder()
        parameters = inspect.signature(self.called.forward).parameters
        self.names = frozenset(parameters)
        """The names of its arguments."""
        self._takes_others = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        self._cache_name = "cache" if "cache" in self.names else "past_key_values"  # before transformers 5.24
        self.asked: torch.Tensor | None = None
        """The token ids of the micro-batch that was embedded last."""
        self.positions = Positions()
        """How rows of packed sequences are given their positions."""
        self.asks_lengths = False
        """Whether layers count rows on from the length of their cache, and therefore get a view that has it."""
        self.passes_positions = True
        """Whether positions are passed to a forward that does not name them, but may pass them on."""

    @torch.no_grad()
    def record(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, list[LayerCall]]:
        """Embed a micro-batch: `inputs` -> hidden `[rows, width]`, and how each layer is called.

        The embedding and the outer parameters must be bound.
        """
        positions = inputs.get("position_ids")
        self.asked = inputs["input_ids"]
        if positions is not None and self.positions.is_counted:
            return self._record_apart(inputs["input_ids"], positions)
        if positions is not None:
            inputs = {**inputs, "position_ids": positions + self.positions.offset}
        if not self.asks_lengths or positions is None:
            return self._record(inputs)
        view = LengthView(self._sweeping)
        hidden, calls = self._record({**inputs, "use_cache": True, "cache": CacheView(view)})
        view.begin_layers(positions)
        return hidden, calls

    def _record_apart(self, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, list[LayerCall]]:
        """Embed each run of consecutive positions by itself, for a forward that counts on from its cache's length."""
        begins = (positions[0].diff() != 1).nonzero()[:, 0] + 1
        states: list[torch.Tensor] = []
        calls: list[LayerCall] = []
        for first, end in pairwise([0, *begins.tolist(), ids.shape[1]]):
            view = LengthView(self._sweeping, int(positions[0, first]))
            hidden, calls = self._record({"input_ids": ids[:, first:end], "use_cache": True, "cache": CacheView(view)})
            states.append(hidden)
        return torch.cat(states), [replace(call, shape=(1, ids.shape[1])) for call in calls]

    def _record(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, list[LayerCall]]:
        rows = inputs["input_ids"].shape
        self._recorder.begin((rows[0], rows[1]))
        named = {self._cache_name if key == "cache" else key: value for key, value in inputs.items()}
        with noting_masks() if self._sweeping.hands_masks else nullcontext():
            output = self.called(**{key: value for key, value in named.items() if self.takes(key)})
        if output[0].shape[:2] != rows:
            raise TypeError("a layer's output was not taken for what it is")
        hidden, calls = self._recorder.taken()
        return self._recorder.streams.flat(hidden), calls

    @property
    def takes_cache(self) -> bool:
        """Whether it has a cache among its arguments."""
        return self._cache_name in self.names

    def takes(self, key: str) -> bool:
        """Whether it gets an input: an argument that it names, or positions that it may pass on."""
        is_passed_on = key == "position_ids" and self._takes_others and self.passes_positions
        return key in self.names or is_passed_on
