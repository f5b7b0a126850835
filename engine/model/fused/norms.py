"""Finds the modules that are norms with a kernel, by calling them, not by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from engine.kernels import compiled
from engine.kernels.elementwise.norms import Kernel, LayerNorm, RMSNorm, Scaling, kernel_for
from engine.kernels.host import rows as host_rows
from engine.model.sweep_context import SweepContext

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
_SIZES = (1e-4, 1e-2, 1.0, 30.0)
"""The magnitudes of the numbers with which a module is tested: the smallest show the epsilon."""
_OF_EVERY_MODULE = frozenset({*vars(nn.Module()), "sweeping"})
_ROWS = 16
"""The number of rows of each magnitude."""

Norm = RMSNorm | LayerNorm


def fuse_norms(layers: Iterable[nn.Module], context: SweepContext, device: torch.device, dtype: torch.dtype) -> None:
    """Replace norms in `layers` by one kernel each, where there is one for the device and the dtype.

    A module is a norm if its result for random rows has the bits of `RMSNorm` or `LayerNorm` by torch's functions.
    """
    is_short = dtype in (torch.float16, torch.bfloat16)
    kernel = kernel_for(device) if is_short else host_rows.kernel_for(device, dtype, host_rows.norm)
    if kernel is None:
        return
    known: dict[Any, Norm | None] = {}
    """Results by what a module consists of: most layers have the same norms."""
    for layer in layers:
        for module in layer.modules():
            made = _made_of(module)
            if made not in known:
                known[made] = norm_of(module, dtype)
            if (told := known[made]) is not None:
                module.__dict__["forward"] = partial(_normed, module, module.forward, told, kernel, context)


def _made_of(module: nn.Module) -> tuple[Any, ...]:
    """A key that is equal for modules that compute the same: class, sizes, and all other settings."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    plain = tuple(sorted((k, v) for k, v in own.items() if isinstance(v, bool | int | float | str)))
    shapes = tuple((name, value.shape, value.dtype) for name, value in module.named_parameters())
    is_told = len(plain) == len(own) and not module._buffers and not module._modules
    return (type(module), plain, shapes) if is_told else (id(module),)


def norm_of(module: nn.Module, dtype: torch.dtype) -> Norm | None:
    """The norm that a module computes for rows of `dtype`; None if it computes something else."""
    weight, given = module._parameters.get("weight"), dict(module.named_parameters())
    if weight is None or weight.ndim != 1 or not given.keys() <= {"weight", "bias"}:
        return None
    if any(each.shape != weight.shape or each.dtype != dtype for each in given.values()):
        return None
    if any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return None
    epsilons = [value for name in _EPS_NAMES if isinstance(value := getattr(module, name, None), float)]
    if len(epsilons) != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    width = weight.shape[0]
    rows = torch.cat([torch.randn(_ROWS, width, generator=generator) * size for size in _SIZES]).to(dtype)
    numbers: dict[str, torch.Tensor] = {
        name: torch.randn(width, generator=generator).to(dtype) for name in ("weight", "bias") if name in given
    }
    try:
        found = torch.func.functional_call(module, numbers, (rows.unflatten(0, (2, -1)),))
    except Exception:  # it takes something else than rows
        return None
    if not isinstance(found, torch.Tensor) or found.dtype != dtype or found.numel() != rows.numel():
        return None
    known: Iterable[Norm] = [LayerNorm(epsilons[0])]
    if "bias" not in given:
        known = [RMSNorm(epsilons[0], scaling) for scaling in Scaling]
    return next((told for told in known if torch.equal(found.flatten(0, -2), told(rows, **numbers))), None)


def _normed(
    module: nn.Module,
    plain: Callable[..., torch.Tensor],
    told: Norm,
    kernel: Kernel,
    context: SweepContext,
    hidden_states: torch.Tensor,
    *others: Any,
    **named: Any,
) -> torch.Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    is_other = bool(others or named)  # such as a gate, which a norm may be called with or without
    is_there = host_rows.takes(hidden_states, weight) if kernel is host_rows.norm else compiled.is_there(hidden_states)
    if is_other or context.is_stock or hidden_states.dtype != weight.dtype or not is_there:
        return plain(hidden_states, *others, **named)
    return kernel(hidden_states, weight, told.eps, told.scaling, module._parameters.get("bias"))
