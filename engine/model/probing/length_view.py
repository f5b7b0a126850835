"""What layers of a packed micro-batch take for their cache where they count rows on from its length."""

from __future__ import annotations

from typing import Any

import torch

from engine.model.padded import ProbingView
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
