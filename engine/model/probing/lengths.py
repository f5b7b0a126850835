"""Layers that count the rows of a call on from the length of their cache, instead of taking positions."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from engine.model.attention.mask import noting_masks
from engine.model.attention.probe import call_on_meta
from engine.model.drivable import Drivable
from engine.model.padded import CacheView, ProbingView
from engine.model.probing.forward import inputs_of, outer_zeros
from engine.model.sweep_context import SweepContext


class LengthView(ProbingView):
    """What layers of a packed micro-batch take for their cache: it tells how many tokens come before a call.

    Rows of a call are of several sequences, so that this is a tensor: for each row its position, less its place in the
    call. Added to the places, it gives the positions.
    """

    def __init__(self, sweeping: SweepContext, num_before: int = 0) -> None:
        """num_before: tokens that the model's own forward is to count on from."""
        super().__init__(sweeping)
        self._num_before = num_before
        self.before: torch.Tensor | None = None
        """`[rows]`, once the model's own forward has called its layers' stand-ins."""
        self.is_asked = False
        """Whether a layer has asked since then."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give new keys and values back; attention keeps them."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys."""
        return self._num_before + query_length, 0

    def get_seq_length(self) -> Any:
        """Tokens before the new rows."""
        if self.before is None:
            return self._num_before
        self.is_asked = True
        return self.before

    def begin_layers(self, positions: torch.Tensor) -> None:
        """Tell layers, from now on, where rows `[1, rows]` are in their sequences."""
        self.before = positions[0] - torch.arange(positions.shape[1], device=positions.device)


def asks_lengths(model: Drivable) -> bool:
    """Whether layers ask their cache how long it is, as far as that shows when they are called on `meta`."""
    view, context = LengthView(model.sweeping), model.sweeping
    reaches, is_plain = dict(context.reaches), context.is_plain
    rows = torch.zeros(1, 2, dtype=torch.long)
    with suppress(Exception):  # of families that want another cache, which layers do not get here
        with outer_zeros(model), noting_masks() as context.masks:
            hidden, calls = model.record(inputs_of(model, rows) | {"use_cache": True, "cache": CacheView(view)})
        view.begin_layers(rows)
        for index, (layer, call) in enumerate(zip(model.layers, calls, strict=True)):
            context.layer, context.probed = index, None
            call_on_meta(layer, hidden.unflatten(0, call.shape), call.args, call.kwargs)
    context.reaches, context.is_plain = reaches, is_plain
    return view.is_asked
