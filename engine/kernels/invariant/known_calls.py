"""Remembers module calls that only moved numbers or changed them elementwise: equal calls will do so again."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from enum import IntEnum
from typing import Any

import torch
from torch import nn

DEVICES = frozenset({"cuda"})
"""Device types whose elementwise functions compute a number alike at any position, and whose memory the host reads
through torch's functions alone."""
_TELLING = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
"""The torch tags of functions whose results the host can see."""
_QUIET = frozenset(
    [
        "_reshape_alias",
        "_to_copy",
        "_unsafe_view",
        "arange",
        "cat",
        "clone",
        "constant_pad_nd",
        "copy_",
        "embedding",
        "empty",
        "empty_like",
        "fill_",
        "flip",
        "full",
        "full_like",
        "gather",
        "index_select",
        "new_empty",
        "new_full",
        "new_ones",
        "new_zeros",
        "ones",
        "ones_like",
        "repeat",
        "roll",
        "split_with_sizes",
        "stack",
        "tril",
        "triu",
        "zero_",
        "zeros",
        "zeros_like",
    ]
)
"""Functions that move numbers without showing the host any value, not even by the size of a result; and views."""
_MOST = 1 << 13
"""The most calls that are remembered."""


class Seen(IntEnum):
    """The strongest effect that the functions of a call were seen to have."""

    QUIET = 0
    """Numbers were moved, and changed one by one."""
    ROUNDED = 1
    """Numbers were summed. The sizes of results followed from other sizes."""
    TOLD = 2
    """The host may have read a number, or an unknown function was called."""


class KnownCalls:
    """The observed effects of module calls, by everything that may affect a call except the numbers in tensors."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, Seen] = {}

    def get(self, case: Hashable | None) -> Seen | None:
        """The observed effect of a call; None for a new one."""
        return self._seen.get(case)

    def put(self, case: Hashable, seen: Seen) -> None:
        """Remember the effect of a call."""
        if len(self._seen) >= _MOST:
            self._seen.clear()
        self._seen[case] = seen


def case_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable | None:
    """The key of a call of `module`, without the numbers in its tensors; None where an argument has unknown content."""
    try:
        return module, _described(args), _described(kwargs)
    except _UnknownError:
        return None


class _UnknownError(Exception):
    """Raised for an argument of unknown content."""


def _described(value: Any) -> Hashable:
    kind = type(value)
    if kind is torch.Tensor or kind is nn.Parameter:
        if value.device.type not in DEVICES or value.layout is not torch.strided:
            raise _UnknownError
        return value.shape, value.stride(), value.dtype, value.device
    if kind is tuple or kind is list:
        return kind, *map(_described, value)
    if kind is dict:
        return kind, *((name, _described(item)) for name, item in value.items())
    if value is None or kind in (bool, int, float, str, torch.dtype, torch.device):
        return kind, value
    raise _UnknownError


def seen_in(func: Any, *values: Any, rounds: bool = False) -> Seen:
    """The effect of a call of an `aten` function, either one of the mode's own (`rounds`) or one that rounds nothing.

    `values`: the function's arguments and results. All tensors must be on a device: the host reads its own memory
    without asking torch.
    """
    name = func._schema.name.removeprefix("aten::")
    is_known = rounds or func.is_view or name in _QUIET or torch.Tag.pointwise in func.tags
    tells = not _TELLING.isdisjoint(func.tags) or any("Tensor" not in str(x.type) for x in func._schema.returns)
    if not is_known or tells or any(x.device.type not in DEVICES for x in _tensors(values)):
        return Seen.TOLD
    return Seen.ROUNDED if rounds else Seen.QUIET


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


class State:
    """The Python state of a module and its submodules: a call that changes it may differ from the next."""

    def __init__(self, module: nn.Module) -> None:
        self._held = list(_held_by(module))

    def is_still(self, module: nn.Module) -> bool:
        """Whether the state is unchanged."""
        now = list(_held_by(module))
        return len(now) == len(self._held) and all(x is y for x, y in zip(now, self._held, strict=True))


def _held_by(module: nn.Module) -> Iterator[Any]:
    """The attributes, and the contents of containers among them."""
    for each in module.modules():
        for value in vars(each).values():
            yield value
            if isinstance(value, dict):
                yield from value.values()
            elif isinstance(value, list | tuple | set):
                yield from value
            elif not isinstance(value, nn.Module | torch.Tensor | type):
                yield from getattr(value, "__dict__", {}).values()
