"""Checks with a few rows of random numbers whether an indexer chooses for each row independently."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.model.indexers.indexer import Indexer
from engine.model.rows_apart import mapped, tried
from engine.model.undrivable import UndrivableError

_ROWS = 3
_SEEDS = 5
"""Several seeds, since keys of equal score may be chosen either way, though not in all of them."""


def try_choice(indexer: Indexer, layer: nn.Module) -> None:
    """Before an indexer is attached, let it choose from slightly too many keys, for rows together and alone.

    Raises `UndrivableError` where the choices differ, are no positions, or contain duplicates, and where it does not
    choose all keys if there are no more. For a module that cannot be tried, nothing is checked.
    """
    with tried(layer, indexer.kind, UndrivableError):
        if not any(_is_apart(indexer, seed) for seed in range(_SEEDS)):
            raise UndrivableError(f"its {indexer.kind} chooses other keys for a row in another batch")


def _is_apart(indexer: Indexer, seed: int) -> bool:
    generator = torch.Generator().manual_seed(seed)
    before, kind = indexer.top_k + _ROWS, indexer.kind
    keys = torch.randn(before + _ROWS, indexer.dim, generator=generator)
    keys = keys.double() if indexer.dtype == torch.float64 else keys

    def numbers(like: torch.Tensor, first: int) -> torch.Tensor:
        shape = (1, _ROWS, *like.shape[2:])
        if like.is_floating_point():
            return torch.randn(shape, generator=generator)
        return torch.arange(first, first + _ROWS).view(1, _ROWS, *[1] * (like.ndim - 2)).expand(shape)

    given = mapped(lambda like: numbers(like, before), indexer.given)
    together = indexer.choose(given, keys)
    if any(len(row.unique()) != together.shape[-1] or int(row.min()) < 0 for row in together.flatten(0, 1)):
        raise UndrivableError(f"its {kind} does not choose {indexer.top_k} different keys for each row")
    if together.shape[1:] != (_ROWS, indexer.top_k // indexer.block) or any(
        int(together[:, at].max()) * indexer.block > before + at for at in range(_ROWS)
    ):
        raise UndrivableError(f"its {kind} chooses keys of later tokens, or too few")
    few = indexer.choose(mapped(lambda like: numbers(like, 0), indexer.given), keys[:_ROWS])
    is_later = torch.arange(_ROWS) > torch.arange(_ROWS)[:, None]
    if indexer.top_k >= _ROWS and not bool((indexer.mask_of(few, _ROWS) | is_later).all()):
        raise UndrivableError(f"its {kind} leaves out keys where there are no more than it chooses")
    whole = indexer.mask_of(together, len(keys))
    for at in range(_ROWS):
        length = before + at + 1
        alone = indexer.mask_of(indexer.choose(_row(given, at), keys[:length]), length)
        if not torch.equal(alone[:, 0], whole[:, at, :length]):
            return False
    return True


def _row(given: dict[str, Any], at: int) -> dict[str, Any]:
    one: dict[str, Any] = mapped(lambda rows: rows[:, at : at + 1], given)
    return one
