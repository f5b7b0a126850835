"""Finds the modules that are norms with a kernel, by calling them, not by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from engine.kernels.elementwise.norms import Kernel, LayerNorm, RMSNorm, Scaling, kernel_for
from engine.kernels.host import rows as host_rows
from engine.model.fused.replacing import Replacement, replace
from engine.model.fused.row_kernel import RowKernel, row_kernel
from engine.model.sweep_context import SweepContext

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
_SIZES = (1e-4, 1e-2, 1.0, 30.0)
"""The magnitudes of the numbers with which a module is tested: the smallest show the epsilon."""
_ROWS = 16
"""The number of rows of each magnitude."""

Norm = RMSNorm | LayerNorm


def fuse_norms(layers: Iterable[nn.Module], context: SweepContext, device: torch.device, dtype: torch.dtype) -> None:
    """Replace norms in `layers` by one kernel each, where there is one for the device and the dtype.

    A module is a norm if its result for random rows has the bits of `RMSNorm` or `LayerNorm` by torch's functions.
    """
    kernel: RowKernel[Kernel] | None = row_kernel(device, dtype, kernel_for, host_rows.norm)
    if kernel is None:
        return

    def replacement(module: nn.Module) -> Replacement | None:
        told = norm_of(module, dtype)
        return None if told is None else lambda each: partial(_normed, each, each.forward, told, kernel, context)

    replace((module for layer in layers for module in layer.modules() if not module._modules), replacement)


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
    kernel: RowKernel[Kernel],
    context: SweepContext,
    hidden_states: torch.Tensor,
    *others: Any,
    **named: Any,
) -> torch.Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    is_other = bool(others or named)  # such as a gate, which a norm may be called with or without
    if is_other or context.is_stock or not kernel.takes(hidden_states, weight):
        return plain(hidden_states, *others, **named)
    return kernel.call(hidden_states, weight, told.eps, told.scaling, module._parameters.get("bias"))
