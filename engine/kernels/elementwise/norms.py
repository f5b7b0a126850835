"""Norms of rows as model families write them, and the kernel that replaces them where a device can have it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.nn.functional as F

from engine.kernels.compiled import where_compiled


class Scaling(IntEnum):
    """When the rows of a norm are multiplied by its weight."""

    ROUNDED = 0
    """After rounding to their dtype."""
    WIDE = 1
    """In float32, before rounding."""
    WIDE_FROM_ONE = 2
    """In float32, before rounding, by 1 + weight."""


@dataclass(frozen=True)
class RMSNorm:
    """A root-mean-square norm: each row divided by its root mean square, in float32, and scaled."""

    eps: float
    """The epsilon that is added to the mean square."""
    scaling: Scaling

    def __call__(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Apply torch's functions: rows `[…, width]` scaled by weight `[width]`, in the dtype of the rows."""
        wide = rows.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.scaling is Scaling.ROUNDED:
            return weight * normed.to(rows.dtype)
        factor = weight.float() + (1.0 if self.scaling is Scaling.WIDE_FROM_ONE else 0.0)
        return (normed * factor).to(rows.dtype)


@dataclass(frozen=True)
class LayerNorm:
    """A layer norm: each row less its mean, divided by its standard deviation, scaled and shifted, in float32."""

    eps: float
    """The epsilon that is added to the variance."""
    scaling = Scaling.WIDE

    def __call__(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Apply torch's function: rows `[…, width]` scaled by weight, shifted by bias `[width]`, all of one dtype."""
        return F.layer_norm(rows, weight.shape, weight, bias, self.eps)


Kernel = Callable[[torch.Tensor, torch.Tensor, float, int, torch.Tensor | None], torch.Tensor]
"""The kernel's signature: 16-bit rows and weight of one dtype on the current device, eps, scaling, and a layer
norm's bias."""


@where_compiled
def kernel_for() -> Kernel:
    """The kernel's function for a device; None without one."""
    from engine.kernels.elementwise.norm_kernel import norm

    return norm
