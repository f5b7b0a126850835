"""Finds out what a family's masks hide by evaluating its own mask functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.batch.reach import Reach
from engine.errors import named
from engine.model.stub import is_same
from engine.model.undrivable import UndrivableError

MaskFunction = Callable[[Any, Any, Any, Any], Any]
"""(sequence, head, position of the query, position of the key) -> whether the query attends to the key."""

_NEAR = 10
"""All positions below it are compared with each other."""
_FAR = 23
"""Positions around powers of two up to this one are compared, too: no model has a longer window."""


_MOST = 1 << 24
"""More than the number of compared positions."""


@dataclass(eq=False)
class MaskNotes:
    """The masks that a model's forward made for its layers, each identified by a placeholder tensor."""

    made: list[tuple[torch.Tensor, MaskFunction]] = field(default_factory=list)

    def stand_for(self, mask_function: MaskFunction) -> torch.Tensor:
        """A placeholder tensor that the model hands to its layers as the mask."""
        mask = torch.zeros(1, 1, 1, 1)
        self.made.append((mask, mask_function))
        return mask

    def knows(self, mask: torch.Tensor) -> bool:
        """Whether a value is the placeholder of one of these masks."""
        return any(is_same(mask, known) for known, _ in self.made)

    def knows_base(self, value: Any) -> bool:
        """Whether a tensor is the placeholder of one of these masks, or a view of one."""
        return isinstance(value, torch.Tensor) and any(
            value.device == known.device and value.untyped_storage().data_ptr() == known.untyped_storage().data_ptr()
            for known, _ in self.made
        )

    def reach_of(self, mask: torch.Tensor) -> Reach | None:
        """The reach of a placeholder's mask; None for another tensor.

        Raises `UndrivableError` for a mask that is neither causal nor a causal window or chunks: only here, because
        families make masks that none of their layers uses.
        """
        function = next((function for known, function in self.made if is_same(mask, known)), None)
        if function is None:
            return None
        with torch.device("cpu"):  # layers are probed on `meta`
            return reach_of(function)


_notes: ContextVar[MaskNotes | None] = ContextVar("mask notes", default=None)


@contextmanager
def noting_masks() -> Iterator[MaskNotes]:
    """Inside, masks that this thread's models make are evaluated and noted; outside, none is made."""
    notes = MaskNotes()
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def make_mask(*_: Any, mask_function: MaskFunction, **__: Any) -> torch.Tensor | None:
    """The function registered with `transformers.AttentionMaskInterface`.

    While a model is opened it returns the mask's placeholder; afterwards None, because the segments of a micro-batch
    determine who attends to whom.
    """
    notes = _notes.get()
    return None if notes is None else notes.stand_for(mask_function)


def reach_of(mask_function: MaskFunction) -> Reach:
    """The rule that a mask function follows on a grid of positions; `UndrivableError` for any other function."""
    positions = sorted({*range(_NEAR), *(2**power + step for power in range(3, _FAR) for step in (-1, 0, 1))})
    limit = _limit_of(mask_function, positions[-1])
    if limit is not None:
        borders = {limit * times + step for times in (1, 2, 3) for step in (-2, -1, 0, 1)}
        positions = sorted({*positions, *(at for at in borders if at >= 0)})
    query, key = (at.flatten() for at in torch.meshgrid(*[torch.tensor(positions)] * 2, indexing="ij"))
    seen = _evaluate(mask_function, query, key)
    for reach in [Reach()] if limit is None else [Reach(window=limit), Reach(chunk=limit)]:
        if seen.equal(reach.sees(query, key)):
            return reach
    kind = "tokens attend to later ones" if _looks_ahead(mask_function) else "a mask of its own"
    raise UndrivableError(f"its attention is neither causal nor a causal window or chunks: {kind}")


def _limit_of(mask_function: MaskFunction, last: int) -> int | None:
    """The first position that does not attend to the first token; None where all up to `last` do."""

    def sees_first(at: int) -> bool:
        return bool(_evaluate(mask_function, torch.tensor([at]), torch.tensor([0]))[0])

    if sees_first(last) or not sees_first(0):
        return None
    seeing, blind = 0, last
    while blind - seeing > 1:
        middle = (seeing + blind) // 2
        seeing, blind = (middle, blind) if sees_first(middle) else (seeing, middle)
    return blind


def _evaluate(mask_function: MaskFunction, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Evaluate the function at pairs of positions: bool of the shape of `query` and `key`."""
    zero = torch.zeros((), dtype=torch.long)
    try:
        with _looked_up_anywhere(mask_function):
            found = torch.func.vmap(lambda at, of: torch.as_tensor(mask_function(zero, zero, at, of)))(query, key)
    except Exception as error:  # it looks up something of the text at these positions
        raise UndrivableError(f"its attention mask depends on more than positions ({named(error)})") from None
    return found.bool()


@contextmanager
def _looked_up_anywhere(mask_function: MaskFunction) -> Iterator[None]:
    """Inside, per-position tensors of a mask function are extended, with equal values, to cover the whole grid.

    Among them are the groups of images, of which a text has none.
    """
    with ExitStack() as stack:
        for cell in _cells(mask_function):
            value = cell.cell_contents
            if isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[1] > 1:
                first = value[:, :1]
                if value.equal(first.expand_as(value)):
                    stack.callback(setattr, cell, "cell_contents", value)
                    cell.cell_contents = first.expand(-1, _MOST)
        yield


def _cells(function: Any) -> Iterator[Any]:
    """The closure cells of a function and of those that it calls."""
    for cell in getattr(function, "__closure__", None) or ():
        yield cell
        kept = cell.cell_contents
        for inner in kept if isinstance(kept, tuple | list) else (kept,):
            if callable(inner):
                yield from _cells(inner)


def _looks_ahead(mask_function: MaskFunction) -> bool:
    return bool(_evaluate(mask_function, torch.tensor([0]), torch.tensor([1]))[0])
