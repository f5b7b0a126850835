"""Whether an indexer chooses for each row by itself, tried with a few rows of random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.errors import named
from engine.model.indexers.indexer import Indexer
from engine.model.rows_apart import NoNumbersError, Sketch, mapped, numbers_in
from engine.model.undrivable import UndrivableError

_ROWS = 3
_SEEDS = 5
"""Keys of the same score are chosen one way or the other; not in all of these."""
_WHOLE = 1 << 22
"""Parameters of at most so many numbers get some; linear layers may have more."""


def try_choice(indexer: Indexer, layer: nn.Module) -> None:
    """Let an indexer, before it is attached, choose of a few more keys than it chooses, for rows together and alone.

    Raises `UndrivableError` where that is not the same, where positions are none, or come twice, and where it does not
    choose all keys if there are no more. Of a module that cannot be tried, nothing is said.
    """
    with numbers_in(layer, _WHOLE), Sketch(), torch.no_grad():
        try:
            if not any(_is_apart(indexer, seed) for seed in range(_SEEDS)):
                raise UndrivableError(f"its {indexer.kind} chooses other keys for a row in other company")
        except (UndrivableError, NoNumbersError) as error:
            if isinstance(error, UndrivableError):
                raise
        except Exception as error:
            if "meta" not in str(error):  # else a matrix without numbers
                raise UndrivableError(f"its {indexer.kind} does not run: {named(error)}") from None


def _is_apart(indexer: Indexer, seed: int) -> bool:
    generator = torch.Generator().manual_seed(seed)

    def numbers(like: torch.Tensor) -> torch.Tensor:
        shape = (1, _ROWS, *like.shape[2:])
        if like.is_floating_point():
            return torch.randn(shape, generator=generator)
        return torch.arange(_ROWS).expand(1, _ROWS) if like.ndim == 2 else torch.zeros(shape, dtype=like.dtype)

    given = mapped(numbers, indexer.given)
    before = indexer.top_k + _ROWS
    length = before + _ROWS
    keys = torch.randn(1, length, indexer.dim, generator=generator)
    if indexer.dtype != torch.float32 and indexer.dtype.itemsize > 4:
        keys = keys.to(indexer.dtype)
    together = indexer.choose(given, keys)
    alone = [indexer.choose(_row(given, at), keys[:, : before + at + 1])[0] for at in range(_ROWS)]
    few = indexer.choose(given, keys[:, :_ROWS])
    kind = indexer.kind
    if together.shape != (_ROWS, indexer.top_k) or any(len(row.unique()) != indexer.top_k for row in together):
        raise UndrivableError(f"its {kind} does not choose {indexer.top_k} different keys for each row")
    if any(int(row.min()) < 0 or int(row.max()) > before + at for at, row in enumerate(together)):
        raise UndrivableError(f"its {kind} chooses keys of later tokens, or none")
    if indexer.top_k >= _ROWS and any(not {*range(at + 1)} <= {*row.tolist()} for at, row in enumerate(few)):
        raise UndrivableError(f"its {kind} leaves out keys where there are no more than it chooses")
    return all({*one.tolist()} == {*other.tolist()} for one, other in zip(together, alone, strict=True))


def _row(given: dict[str, Any], at: int) -> dict[str, Any]:
    one: dict[str, Any] = mapped(lambda rows: rows[:, at : at + 1], given)
    return one
