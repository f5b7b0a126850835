"""The weighted sum of the experts that each token chose, by our kernels where a device has them, else by torch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.kernels import compiled
from engine.kernels.compiled import where_compiled
from engine.kernels.grouped import by_torch
from engine.kernels.grouped.by_torch import rows_of_experts
from engine.kernels.grouped.matrices import Matrices

_Mixture = Callable[[Matrices, torch.Tensor, torch.Tensor, torch.Tensor, list[int] | None], torch.Tensor]


def mixture(matrices: Matrices, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Hidden `[tokens, hidden size]` -> the same shape and dtype; index and weights are `[tokens, choices]`.

    Choices of experts that do not exist (`index` of `matrices.count` or more) add nothing.
    """
    is_of_one = hidden.dtype == matrices.first.dtype == matrices.second.dtype
    kernel = _kernel_for(hidden.device) if is_of_one and hidden.dtype in compiled.DTYPES else None
    return (kernel or by_torch.mixture)(matrices, hidden, index, weights, _announced(matrices, index))


def _announced(matrices: Matrices, index: torch.Tensor) -> list[int] | None:
    """The number of rows of each expert, if only some experts have to be fetched; they are announced to the loader.

    The host waits for these counts, which takes less time than fetching the other experts.
    """
    stacks = [stack for stack in (matrices.first, matrices.second) if stack.expect is not None]
    counts = rows_of_experts(index, matrices.count) if stacks and index.numel() < matrices.count else None
    for stack in stacks:
        assert stack.expect is not None
        stack.expect(list(stack.groups(counts)))
    return counts


@where_compiled
def _kernel_for() -> _Mixture:
    """Our kernels' function for a device; None without one."""
    from engine.kernels.grouped.kernel import mixture as by_triton

    return by_triton
