"""The cache of layers in a packed micro-batch that count rows on from its length."""

from __future__ import annotations

from typing import Any

import torch

from engine.model.padded import ProbingView
from engine.model.sweep_context import SweepContext


class LengthView(ProbingView):
    """A cache for layers of a packed micro-batch, which reports the number of tokens before a call.

    The rows of a call belong to several sequences, so the number is a tensor: for each row its position, less its index
    in the call. Added to the indices, it gives the positions.
    """

    def __init__(self, sweeping: SweepContext, num_before: int = 0) -> None:
        """num_before: the number of tokens from which the model's own forward is to count on."""
        super().__init__(sweeping)
        self._num_before = num_before
        self.before: torch.Tensor | None = None
        """The number of tokens before each row, `[rows]`, once the model's own forward has called its layers' stubs."""
        self.is_asked = False
        """Whether a layer has asked for the length since then."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return new keys and values; attention stores them."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The length and offset of the keys."""
        return self._num_before + query_length, 0

    def get_seq_length(self) -> Any:
        """The number of tokens before the new rows."""
        if self.before is None:
            return self._num_before
        self.is_asked = True
        return self.before

    def begin_layers(self, positions: torch.Tensor) -> None:
        """From now on, report to layers where rows `[1, rows]` are in their sequences."""
        self.before = positions[0] - torch.arange(positions.shape[1], device=positions.device)
