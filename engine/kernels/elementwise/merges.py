"""Merges attention over two parts of a context: by torch, or by one kernel where a device can have it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.kernels import compiled
from engine.kernels.compiled import where_compiled


def merge(output: torch.Tensor, logsumexp: torch.Tensor, shared: torch.Tensor, shared_logsumexp: torch.Tensor) -> None:
    """Merge `output` `[rows, heads, dim]`, over own tokens, in place with `shared`, the output over the prefix.

    Log-sum-exps are `[heads, rows]`; the weight of the prefix is its share of the sum of exponentials. The weight is
    rounded to the dtype of both outputs, and then their weighted mean is.
    """
    kernel = kernel_for(output.device) if compiled.takes(output, shared) else None
    if kernel is not None and _fits(output, logsumexp, shared, shared_logsumexp):
        kernel(output, logsumexp, shared, shared_logsumexp)
        return
    weight = torch.sigmoid(shared_logsumexp - logsumexp).T[:, :, None]
    output.lerp_(shared, weight.to(output.dtype))


def _fits(output: torch.Tensor, logsumexp: torch.Tensor, shared: torch.Tensor, shared_logsumexp: torch.Tensor) -> bool:
    """Whether strides, and the dtype of the log-sum-exps, are those that the kernel supports."""
    return (
        output.is_contiguous()
        and shared.is_contiguous()
        and all(x.dtype == torch.float32 and x.stride(1) == 1 for x in (logsumexp, shared_logsumexp))
    )


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""The kernel's signature: `merge` for contiguous 16-bit tensors on the current device."""


@where_compiled
def kernel_for() -> Kernel:
    """The kernel's function for a device; None without one."""
    from engine.kernels.elementwise.merge_kernel import merge_parts

    return merge_parts
