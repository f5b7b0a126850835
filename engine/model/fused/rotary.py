"""Which attention modules turn queries and keys by a function that one kernel computes: found out by calling it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from engine.kernels.rotary import Kernel, kernel_for, rotated
from engine.model.sweep_context import SweepContext

NAME = "apply_rotary_pos_emb"
"""What `transformers` calls such functions, in each family's own module."""
_DEPRECATION = "transformers.utils.deprecation"
"""Whose functions around another one change nothing of calls by today's names."""
_HEADS, _ROWS, _DIM = 3, 5, 16
_Turn = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def fuse_rotary(layers: Iterable[nn.Module], context: SweepContext, device: torch.device, dtype: torch.dtype) -> None:
    """Let attention in `layers` turn queries and keys by one kernel each, where there is one for device and dtype.

    The function is a global name of the family's module: the forward of an attention whose function returns the bits
    of `rotated` is called with globals of its own, in which the name is another function.
    """
    kernel = kernel_for(device) if dtype in (torch.float16, torch.bfloat16) else None
    if kernel is None:
        return
    fused: dict[FunctionType, FunctionType | None] = {}
    for layer in layers:
        for module in layer.modules():
            forward = _plain_forward(module)
            if forward is None:
                continue
            if forward not in fused:
                plain = forward.__globals__[NAME]
                widths = widths_of(plain, dtype)
                turn = partial(_turn, plain, widths, kernel, context)
                fused[forward] = _with(forward, turn) if widths else None
            if (ours := fused[forward]) is not None:
                module.__dict__["forward"] = MethodType(ours, module)


def _plain_forward(module: nn.Module) -> FunctionType | None:
    """The forward of a module's class, if it calls a function of this name."""
    forward: Any = type(module).forward
    while getattr(forward, "__globals__", {}).get("__name__") == _DEPRECATION and hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    is_plain = (
        isinstance(forward, FunctionType) and not hasattr(forward, "__wrapped__") and "forward" not in vars(module)
    )
    return forward if is_plain and NAME in forward.__code__.co_names and NAME in forward.__globals__ else None


def _with(forward: FunctionType, turn: _Turn) -> FunctionType:
    names = {**forward.__globals__, NAME: turn}
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


@cache
def widths_of(turn: _Turn, dtype: torch.dtype) -> frozenset[int]:
    """Of cosines, in halves of a head: for which a function returns what `rotated` does, to the bit."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    # As layers have them: heads of a row side by side.
    query, key = random(1, _ROWS, _HEADS, _DIM).transpose(1, 2), random(1, _ROWS, 1, _DIM).transpose(1, 2)
    found = set()
    for halves in (1, 2):
        cos, sin = random(1, _ROWS, halves * _DIM // 2), random(1, _ROWS, halves * _DIM // 2)
        try:
            turned = turn(query, key, cos, sin)
            is_same = len(turned) == 2 and all(map(torch.equal, turned, (rotated(x, cos, sin) for x in (query, key))))
        except Exception:  # it takes others, or returns them
            continue
        if is_same:
            found.add(halves)
    return frozenset(found)


def _turn(
    plain: _Turn,
    widths: frozenset[int],
    kernel: Kernel,
    context: SweepContext,
    *states: torch.Tensor,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not context.is_stock and not others and len(states) == 4:
        query, key, cos, sin = states
        if all(_fits(each, cos, sin, widths) for each in (query, key)):
            return kernel(query, cos, sin), kernel(key, cos, sin)
    return plain(*states, **others)


def _fits(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, widths: frozenset[int]) -> bool:
    """Whether the kernel takes them."""
    return (
        _is_there(states)
        and states.ndim == 4
        and cos.shape == sin.shape == (1, states.shape[2], cos.shape[-1])
        and states.shape[0] == 1
        and states.dtype == cos.dtype == sin.dtype
        and cos.stride(-1) == sin.stride(-1) == 1
        and any(2 * cos.shape[-1] == halves * states.shape[-1] for halves in widths)
    )


def _is_there(states: torch.Tensor) -> bool:
    """Whether states are where the kernel runs: layers are called on the host, too, when a model is opened."""
    return states.is_cuda
