"""Replaces what modules compute: each kind of module is looked at once, since most layers have the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

from torch import nn

Replacement = Callable[[nn.Module], Callable[..., Any]]
"""Makes the new `forward` of a module."""

_OF_EVERY_MODULE = frozenset({*vars(nn.Module()), "sweeping"})


def made_of(module: nn.Module) -> Hashable:
    """A key that is equal for modules that compute the same: classes, sizes, and all other settings, of all parts."""
    return tuple((name, type(part), *_settings(part)) for name, part in module.named_modules())


def _settings(part: nn.Module) -> Iterable[Hashable]:
    for name, value in vars(part).items():
        if name not in _OF_EVERY_MODULE:
            yield name, value if _is_plain(value) else id(value)
    for name, parameter in part._parameters.items():
        yield name, None if parameter is None else (parameter.shape, parameter.dtype)
    for name, buffer in part._buffers.items():  # its numbers may matter
        yield name, id(buffer)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str)


def replace(
    modules: Iterable[nn.Module],
    replacement: Callable[[nn.Module], Replacement | None],
    kind: Callable[[nn.Module], Hashable] = made_of,
) -> None:
    """Replace the `forward` of modules for which there is something else; those replaced before stay so.

    kind: `replacement` is called once for all modules of which this is equal.
    """
    known: dict[Hashable, Replacement | None] = {}
    for module in modules:
        if "forward" in vars(module):
            continue
        key = kind(module)
        if key not in known:
            known[key] = replacement(module)
        if (found := known[key]) is not None:
            module.__dict__["forward"] = found(module)
