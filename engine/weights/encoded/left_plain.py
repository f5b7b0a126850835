"""Finds, by samples, the parameters of a checkpoint that a lossless codec would not make smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.kernels.weight_codes.lossless_encoder import is_worth_it
from engine.model.causal_model import CausalModel
from engine.weights.loading import steps_by_unit
from engine.weights.receiver import Nowhere
from engine.weights.stored_form import large_matrices

_PIECES = 256
"""Many short pieces: unusual exponents often occur in some rows, or columns, of a matrix."""
_PIECE_ELEMENTS = 256


class _Whole(Nowhere):
    """A plan that is not executed, of tensors that are sampled over their whole length."""

    def adopt(self, name: str, *_: Any) -> int:
        """All elements."""
        return self.model.state[name].numel()


def left_plain(path: Path, model: CausalModel) -> frozenset[str]:
    """The large bfloat16 matrices of the layers that have too many escapes; reads a little of each.

    All processes that open the checkpoint find the same. A matrix whose sample does not show it is refused when it is
    encoded. Raises `CheckpointError` as loading does.
    """
    large = {unit.name: large_matrices(model, unit) for unit in model.units}
    left: set[str] = set()
    for unit, steps in steps_by_unit(path, _Whole(model)).items():
        for names, step in steps:
            candidates = {name for name in names & large[unit] if model.state[name].dtype == torch.bfloat16}
            if candidates and not is_worth_it(_sample(_encoded(step.tensors, names, model))):
                left |= candidates
    return frozenset(left)


def _encoded(tensors: list[torch.Tensor], names: set[str], model: CausalModel) -> list[torch.Tensor]:
    """The tensors whose numbers are encoded: of a matrix that an adapter changes, only the matrix, which is first."""
    is_whole = len(names) == 1 and tensors[0].shape == model.state[next(iter(names))].shape
    return tensors[:1] if is_whole else tensors


def _sample(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Numbers of some mapped tensors from fixed places all over them, as bfloat16."""
    chosen = tensors[:: -(-len(tensors) // _PIECES)]
    each, random = max(1, _PIECES // len(chosen)), torch.Generator().manual_seed(0)
    pieces = []
    for tensor in chosen:
        flat = tensor.reshape(-1)
        last = max(0, flat.numel() - _PIECE_ELEMENTS)
        # One at random in each stretch: at even distances all might lie in the same columns.
        places = (torch.arange(each) + torch.rand(each, generator=random, dtype=torch.float64)) * (last / each)
        pieces += [flat[first : first + _PIECE_ELEMENTS].to(torch.bfloat16) for first in places.long().tolist()]
    return torch.cat(pieces)
