"""How a module that takes a cache is called, by argument names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache

from engine.errors import UnsupportedError

_CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""The names of a cache argument; the last two before transformers 5.24."""


def cache_name(forward: Callable[..., Any]) -> str | None:
    """The parameter of a module's forward that takes a cache; None where there is none."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in _CACHE_NAMES if name in parameters), None)


class Call:
    """A call of a module's forward that takes a cache."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self._signature = inspect.signature(forward)
        parameters = self._signature.parameters.values()
        self._others = next((each.name for each in parameters if each.kind is each.VAR_KEYWORD), None)
        self._cache_name = cache_name(forward) or ""

    def named(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """The arguments by name, without the cache."""
        given = dict(self._signature.bind(*args, **kwargs).arguments)
        given |= given.pop(self._others, {}) if self._others is not None else {}
        return {name: value for name, value in given.items() if name != self._cache_name}

    def on(self, given: dict[str, Any], cache: Cache | None) -> Any:
        """Call it with a cache."""
        return self._forward(**given, **{self._cache_name: cache})

    @staticmethod
    def lead(given: dict[str, Any]) -> tuple[int, int]:
        """The sequences and rows of the hidden states, which are the first of the arguments."""
        hidden = next(iter(given.values()), None)
        if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3:
            raise UnsupportedError("what keeps a state gets no hidden states [sequences, rows, width] first")
        return hidden.shape[0], hidden.shape[1]


def is_of_rows(value: Any, lead: tuple[int, int]) -> bool:
    """Whether all tensors of an argument begin with `[sequences, rows]`."""
    if isinstance(value, torch.Tensor):
        return value.shape[:2] == lead
    if isinstance(value, tuple | list):
        return all(is_of_rows(item, lead) for item in value)
    return all(is_of_rows(item, lead) for item in value.values()) if isinstance(value, dict) else True
