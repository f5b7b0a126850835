"""Elementwise functions on the CPU whose results do not depend on a number's position in its tensor."""

from __future__ import annotations

from typing import Any

import torch

_AT_ONCE = 1 << 14
"""The most numbers of one call: fewer than torch's CPU kernels split among threads, since a border between threads
may cut a vector."""
_VECTOR = 64
"""At least the number of elements of a CPU vector."""
_EXACT = frozenset(
    [
        "abs",
        "add",
        "bitwise_and",
        "bitwise_not",
        "bitwise_or",
        "bitwise_xor",
        "ceil",
        "clamp",
        "clamp_max",
        "clamp_min",
        "div",
        "eq",
        "fill",
        "floor",
        "ge",
        "gt",
        "isfinite",
        "isinf",
        "isnan",
        "le",
        "logical_and",
        "logical_not",
        "logical_or",
        "lt",
        "masked_fill",
        "maximum",
        "minimum",
        "mul",
        "ne",
        "neg",
        "relu",
        "round",
        "rsub",
        "sign",
        "sub",
        "threshold",
        "trunc",
        "where",
    ]
)
"""Functions that IEEE 754 defines exactly, so that they agree in a vector and alone."""


def in_vectors(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an elementwise `aten` function so that every number is computed by the vectorized loop.

    Numbers left over after the last whole vector are computed by another function (libm's `exp`, say), which rounds
    otherwise; which numbers those are depends on the number of rows and of threads.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.ndim]
    if _is_exact(function, args, kwargs) or not tensors or any(x.device.type != "cpu" for x in tensors):
        return function(*args, **kwargs)
    if not any(x.is_floating_point() or x.is_complex() for x in tensors):
        return function(*args, **kwargs)
    if function._schema.is_mutable:
        changed = args[0]
        name = function._schema.name.removeprefix("aten::").removesuffix("_")
        plain = getattr(getattr(torch.ops.aten, name), function._overloadname)
        return changed.copy_(in_vectors(plain, args, kwargs))
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    count = shape.numel()
    rest = -count % _VECTOR
    flat = {id(x): _padded(x.expand(shape).reshape(-1), rest) for x in tensors}
    parts = []
    for first in range(0, count + rest, _AT_ONCE):
        taken = slice(first, first + _AT_ONCE)
        given = [flat[id(x)][taken] if id(x) in flat else x for x in args]
        named = {key: flat[id(x)][taken] if id(x) in flat else x for key, x in kwargs.items()}
        parts.append(function(*given, **named))
    if not parts:
        return function(*args, **kwargs)
    return torch.cat(parts)[:count].view(shape)


def _is_exact(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = function._schema.name.removeprefix("aten::").removesuffix("_")
    if any(isinstance(value, torch.Tensor) and value.is_complex() for value in args):
        return False
    # A factor of the second number may be fused with the sum, or not.
    return name in _EXACT and kwargs.get("alpha", 1) == 1 and not (name in ("sub", "rsub") and len(args) > 2)


def _padded(flat: torch.Tensor, rest: int) -> torch.Tensor:
    return torch.cat((flat, flat.new_ones(rest))) if rest else flat
