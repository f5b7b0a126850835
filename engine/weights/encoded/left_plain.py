"""Which parameters of a checkpoint a lossless codec would not make smaller, by a sample of their numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.kernels.weight_codes.lossless_encoder import is_worth_it
from engine.model.causal_model import CausalModel
from engine.weights.loading import steps_by_unit
from engine.weights.receiver import Nowhere
from engine.weights.stored_form import large_matrices

_PIECES = 16
_PIECE_ELEMENTS = 4096


class _Whole(Nowhere):
    """A plan that nobody carries out, of tensors that are looked at from their first number to their last."""

    def adopt(self, name: str, *_: Any) -> int:
        """All."""
        return self.model.state[name].numel()


def left_plain(path: Path, model: CausalModel) -> frozenset[str]:
    """Large matrices of the layers, in bfloat16, that have too many escapes; reads a little of each.

    All processes that open the checkpoint find the same. What a sample does not show is refused when it is encoded.
    Raises `CheckpointError` as loading does.
    """
    large = {unit.name: large_matrices(model, unit) for unit in model.units}
    left: set[str] = set()
    for unit, steps in steps_by_unit(path, _Whole(model)).items():
        for names, step in steps:
            candidates = {name for name in names & large[unit] if model.state[name].dtype == torch.bfloat16}
            if candidates and not is_worth_it(_sample(step.tensors)):
                left |= candidates
    return frozenset(left)


def _sample(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Numbers of some mapped tensors that lie apart in them, as bfloat16."""
    chosen = tensors[:: -(-len(tensors) // _PIECES)]
    each = max(1, _PIECES // len(chosen))
    pieces = []
    for tensor in chosen:
        flat = tensor.reshape(-1)
        last = max(0, flat.numel() - _PIECE_ELEMENTS)
        for index in range(each):
            first = last * index // max(1, each - 1)
            pieces.append(flat[first : first + _PIECE_ELEMENTS].to(torch.bfloat16))
    return torch.cat(pieces)
