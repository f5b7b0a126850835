"""The weighted sum of the experts that each token chose, by kernels of ours where a device has them, else by torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from engine.kernels.grouped import by_torch
from engine.kernels.grouped.matrices import Matrices
from engine.memory import accelerator

_Mixture = Callable[[Matrices, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def mixture(matrices: Matrices, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Hidden `[tokens, hidden size]` -> the same shape and dtype; index and weights are `[tokens, choices]`.

    A choice of an expert that there is not (`index` of `matrices.count` or more) adds nothing.
    """
    computed = (hidden, matrices.first, matrices.second)
    is_narrow = hidden.dtype in (torch.float16, torch.bfloat16) and all(x.dtype == hidden.dtype for x in computed)
    kernel = _kernel_for(hidden.device) if is_narrow else None
    return (kernel or by_torch.mixture)(matrices, hidden, index, weights)


@cache
def _kernel_for(device: torch.device) -> _Mixture | None:
    """Our kernels' function, where Triton compiles for the device."""
    if not accelerator.runs_triton(device):
        return None
    try:
        from engine.kernels.grouped.kernel import mixture as by_triton
    except ImportError:  # torch without Triton
        return None
    return by_triton
