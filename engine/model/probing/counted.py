"""Checks which positions a model's own forward counts, and whether it uses those that it is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from engine.errors import UnsupportedError
from engine.model.drivable import Drivable
from engine.model.padded import CacheView, ProbingView
from engine.model.probing.forward import inputs_of, outer_zeros
from engine.model.probing.length_view import LengthView
from engine.model.probing.positions import Positions
from engine.model.undrivable import UndrivableError

_ROWS, _BEFORE = 3, 5


class _LookUps(TorchFunctionMode):
    """Notes the indices of embedding look-ups."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.embedding:
            ids = args[0] if args else (kwargs or {})["input"]
            self.found.append(ids.reshape(ids.shape[0] if ids.ndim > 1 else 1, -1).clone())
        return func(*args, **(kwargs or {}))


def positions_of(model: Drivable) -> Positions:
    """How a forward of packed rows uses given positions, compared with those it counts itself after a cache.

    Raises `UndrivableError` where they are neither equal, nor offset by a constant, nor the forward's own positions
    that change with the cache's length.
    """
    ids = _ids(model, _ROWS)
    plain = {"input_ids": ids, "use_cache": False}
    given = [{**plain, "position_ids": torch.arange(first, first + _ROWS)[None]} for first in (0, _BEFORE)]
    behind = [{**plain, "use_cache": True, "cache": CacheView(LengthView(model.sweeping, n))} for n in (0, _BEFORE)]
    taken = [_seen(model, inputs) for inputs in given]
    offset = _offset(taken[0], _seen(model, plain))
    if offset is None:
        raise UndrivableError("it counts positions in a way of its own")
    if not model.outer.takes_cache:  # so that it counts from 0 on alone
        return Positions(offset)
    try:
        counted = [_seen(model, inputs) for inputs in behind]
    except UndrivableError:
        raise
    except Exception:  # it wants another cache, which it does not get here: nothing can be said
        return Positions(offset)
    is_taken, is_counted = _offset(*taken) != 0, _offset(*counted) != 0
    if _offset(taken[1], counted[1]) == offset or (is_taken and not is_counted):
        return Positions(offset)
    if is_counted and not is_taken and not counted[0].hands_on:
        return Positions(is_counted=True)
    raise UndrivableError("it counts positions in a way of its own")


def check_padded_positions(model: Drivable) -> None:
    """Raise `UnsupportedError` where left padding changes what a row of a rectangle gets, apart from its mask."""
    alone, padded = (_rectangle(model, padding) for padding in (0, 1))
    for one, other in zip(alone, padded, strict=True):
        apart = [at for at, sizes in enumerate(zip(one.shape, other.shape, strict=True)) if sizes[0] != sizes[1]]
        if len(apart) == 1 and one.shape[apart[0]] == _ROWS:
            behind = other.narrow(apart[0], 1, _ROWS)
            if not torch.allclose(one.float(), behind.float(), atol=1e-6):
                raise UnsupportedError("it counts positions by places in a call, padding included")


def _rectangle(model: Drivable, padding: int) -> list[torch.Tensor]:
    """What a forward makes of a sequence after padding."""
    columns = padding + _ROWS
    mask = torch.ones(1, columns, dtype=torch.long)
    mask[:, :padding] = 0
    return _seen(
        model,
        {
            **inputs_of(model, (torch.arange(columns) - padding).clamp(min=0)[None]),
            "input_ids": _ids(model, columns),
            "attention_mask": mask,
            "cache": CacheView(ProbingView(model.sweeping, columns, columns)),
        },
    ).tensors


def _ids(model: Drivable, count: int) -> torch.Tensor:
    """A token that is no padding, which some families give a position of its own."""
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    return torch.full((1, count), 1 if padding == 0 else 0)


@dataclass(frozen=True)
class _Seen:
    """The effect of positions in a forward."""

    tensors: list[torch.Tensor]
    """The indices of look-ups, hidden states, and the other numbers that layers are called with."""
    hands_on: bool
    """Whether there are such other numbers."""


def _seen(model: Drivable, inputs: dict[str, Any]) -> _Seen:
    with outer_zeros(model), _LookUps() as look_ups:
        hidden, calls = model.record(inputs)
    found: dict[int, torch.Tensor] = {}
    for call in calls:
        found |= {id(each): each for each in _tensors([*call.args, *call.kwargs.values()]) if each.is_floating_point()}
    return _Seen([*look_ups.found, hidden, *found.values()], bool(found))


def _tensors(values: list[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors([*value])


def _offset(one: _Seen, other: _Seen) -> int | None:
    """The constant by which the integers of `other` are larger, if all else is equal; None if there is none."""
    if [each.shape for each in one.tensors] != [each.shape for each in other.tensors]:
        return None
    steps = set[int]()
    for left, right in zip(one.tensors, other.tensors, strict=True):
        if left.is_floating_point():
            if not torch.allclose(left, right, atol=1e-6, equal_nan=True):
                return None
            continue
        more = (right - left).unique()
        if len(more) > 1:
            return None
        steps.add(int(more))
    return next(iter(steps - {0}), 0) if len(steps - {0}) <= 1 else None
