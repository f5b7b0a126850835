"""Finds the function by which a family rotates queries and keys, by calling it, not by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn

from engine.kernels.elementwise.rotations import Kernel, kernel_for, rotated
from engine.kernels.host import rows as host_rows
from engine.model.fused.replacing import Replacement, replace
from engine.model.fused.row_kernel import RowKernel, row_kernel
from engine.model.sweep_context import SweepContext

_TAKES = ("q", "k", "cos", "sin")
"""The names of such a function's arguments."""
_ROWS = 5
_DIM = 16
_TURNED = (16, 8)
"""How much of a head is rotated: all of it, or as much as the cosine is long."""

_Rotation = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def fuse_rotations(
    layers: Iterable[nn.Module], context: SweepContext, device: torch.device, dtype: torch.dtype
) -> None:
    """Replace rotary position embeddings in `layers` by one kernel each, where there is one for device and dtype.

    A module's `forward` is called with its own view of its file's globals, in which such a function is exchanged; the
    function that others see stays as it is.
    """
    kernel: RowKernel[Kernel] | None = row_kernel(device, dtype, kernel_for, host_rows.rotate)
    if kernel is None:
        return

    def replacement(module: nn.Module) -> Replacement | None:
        changed = _with_kernel(type(module).forward, kernel, context, dtype)
        return None if changed is None else lambda each: partial(changed, each)

    every = (module for layer in layers for module in layer.modules())
    replace(every, replacement, kind=lambda module: type(module).forward)


def _with_kernel(
    forward: Callable[..., Any], kernel: RowKernel[Kernel], context: SweepContext, dtype: torch.dtype
) -> Callable[..., Any] | None:
    """`forward` with a kernel in place of rotations; None where it has no known one."""
    inner = inspect.unwrap(forward)
    if not isinstance(inner, FunctionType):
        return None
    exchanged = {
        name: partial(_rotated, function, kernel, context, per_pair)
        for name in inner.__code__.co_names
        if (function := inner.__globals__.get(name)) is not None
        and (per_pair := numbers_per_pair(function, dtype)) is not None
    }
    return _renewed(forward, exchanged) if exchanged else None


def numbers_per_pair(function: Any, dtype: torch.dtype) -> int | None:
    """How often cosine and sine tables hold each rotated pair's value, for a function of queries, keys, cosine, sine.

    None where its result has not the bits of `rotated`, for rows of `dtype`.
    """
    if not isinstance(function, FunctionType) or tuple(inspect.signature(function).parameters)[:4] != _TAKES:
        return None
    if _is_rotation(function, dtype, 2):
        return 2
    return 1 if _is_rotation(function, dtype, 1) else None


def _is_rotation(function: _Rotation, dtype: torch.dtype, per_pair: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    for turned in _TURNED if per_pair == 2 else (_DIM,):
        table = 1, _ROWS, turned * per_pair // 2
        query, key, cosine, sine = (
            torch.randn(shape, generator=generator).to(dtype)
            for shape in ((1, 3, _ROWS, _DIM), (1, 2, _ROWS, _DIM), table, table)
        )
        try:
            found = function(query, key, cosine, sine)
        except Exception:  # it takes something else, or none that turn only a part
            found = ()  # type: ignore[assignment]
        expected = rotated(query, key, cosine, sine, per_pair)
        if not _are_equal(found, expected) and (found or turned == _DIM):
            return False
    return True


def _are_equal(found: Any, expected: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(
        isinstance(one, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        for one, other in zip(found, expected, strict=True)
    )


def _renewed(function: Callable[..., Any], exchanged: dict[str, Any]) -> Callable[..., Any] | None:
    """The same function, under the same decorators, with some of its globals replaced.

    None where a decorator does not keep what it decorates in a closure cell.
    """
    if not isinstance(function, FunctionType):
        return None
    inner = getattr(function, "__wrapped__", None)
    names, cells = {**function.__globals__, **exchanged}, function.__closure__
    if inner is not None:
        renewed = _renewed(inner, exchanged)
        places = [cell.cell_contents is inner for cell in cells or ()]
        if renewed is None or sum(places) != 1:
            return None
        cells = tuple(CellType(renewed) if there else cell for there, cell in zip(places, cells or (), strict=True))
        names = function.__globals__
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _rotated(
    plain: _Rotation,
    kernel: RowKernel[Kernel],
    context: SweepContext,
    per_pair: int,
    *tensors: torch.Tensor,
    **named: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    is_plain = context.is_stock or named or len(tensors) != len(_TAKES)
    if is_plain or not kernel.takes(*tensors) or not _fits(*tensors, per_pair=per_pair):
        return plain(*tensors, **named)
    query, key, cosine, sine = tensors
    return kernel.call(query, key, cosine, sine, per_pair)


def _fits(query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *, per_pair: int) -> bool:
    """Whether the kernel supports these sizes."""
    if query.ndim != 4 or key.ndim != 4 or cosine.ndim != 3:
        return False
    _, _, rows, dim = query.shape
    one, width = cosine.shape[0], cosine.shape[-1]
    return (
        query.shape[0] == key.shape[0] == one == 1
        and key.shape[2:] == (rows, dim)
        and cosine.shape == sine.shape == (1, rows, width)
        and (2 * width == dim if per_pair == 1 else width % 2 == 0 and width <= dim)
        and all(each.stride(-1) == 1 for each in (query, key, cosine, sine))
    )
