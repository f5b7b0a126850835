"""Checks with a few rows of random numbers whether a module uses its cache as expected."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.errors import UnsupportedError
from engine.model.mixers.mixer import Mixer
from engine.model.mixers.states import States
from engine.model.rows_apart import mapped, tried

_ROWS = 6
_TOLERANCE = 1e-3
"""The tolerance for outputs, relative to the largest: rounding in float32 is far less, and a lost state far more."""


def try_out(mixer: Mixer, layer: nn.Module) -> None:
    """Call a mixer, before it is attached, with two sequences, each alone, in parts, and step by step.

    It sets whether the mixer `continues` with several tokens. Raises `UnsupportedError` where sequences interact or a
    step after a state differs from the whole. For a module that cannot be tried, nothing is checked, and it does not
    continue.
    """
    with tried(layer, mixer.kind, UnsupportedError):
        mixer.continues = _Trial(mixer).run()


class _Trial:
    def __init__(self, mixer: Mixer) -> None:
        self._mixer = mixer
        generator = torch.Generator().manual_seed(0)

        def numbers(like: torch.Tensor) -> torch.Tensor:
            shape = (2, _ROWS, *like.shape[2:])
            if like.is_floating_point():
                return torch.randn(shape, generator=generator)
            return torch.arange(_ROWS).expand(2, _ROWS) if like.ndim == 2 else torch.zeros(shape, dtype=like.dtype)

        self._given: dict[str, Any] = mapped(numbers, mixer.given)

    def run(self) -> bool:
        """Whether several tokens may continue a state; one of two sequences is also computed alone."""
        kind, middle = self._mixer.kind, _ROWS // 2
        together, _ = self._of(0, _ROWS, slice(0, 2))
        if not torch.isfinite(together).all():
            return False
        whole = together[1:]
        begun, states = self._of(0, middle)
        if self._differ(whole[:, :middle], begun):
            raise UnsupportedError(f"its {kind}, which keeps a state, mixes sequences")
        step, behind = self._of(middle, middle + 1, states=states)
        next_step, _ = self._of(middle + 1, middle + 2, states=behind)
        if self._differ(whole[:, middle : middle + 2], torch.cat((step, next_step), dim=1)):
            raise UnsupportedError(
                f"its {kind} computes something else for a token after a state than for the whole sequence"
            )
        rest, _ = self._of(middle, _ROWS, states=states)
        forgetful, _ = self._of(middle, _ROWS)
        return self._differ(whole[:, middle:], forgetful) and not self._differ(whole[:, middle:], rest)

    def _of(
        self, first: int, end: int, sequences: slice = slice(1, 2), states: States | None = None
    ) -> tuple[torch.Tensor, States]:
        """The outputs `[sequences, rows, numbers]` of some rows that continue `states`, and the states after them."""
        given = mapped(lambda rows: rows[sequences, first:end], self._given)
        behind = self._mixer.new_states()
        if states is not None:
            behind.begin(states.shape(), [tensor.clone() for tensor in states.held().values()])
        output = self._mixer.on(given, behind)
        tensors = output if isinstance(output, tuple | list) else (output,)
        return torch.cat([tensor.flatten(2) for tensor in tensors if tensor is not None], dim=-1), behind

    @staticmethod
    def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
        return not bool((one - other).abs().max() <= _TOLERANCE * one.abs().max())
