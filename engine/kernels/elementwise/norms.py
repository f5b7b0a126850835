"""Norms of rows as families write them, and one kernel in their place where a device can have it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.nn.functional as F

from engine.kernels.compiled import where_compiled


class Scaling(IntEnum):
    """How the rows of a norm are multiplied by its weight."""

    ROUNDED = 0
    """After they were rounded to their dtype."""
    WIDE = 1
    """In float32, before they are rounded."""
    WIDE_FROM_ONE = 2
    """The same, by 1 + weight."""


@dataclass(frozen=True)
class RMSNorm:
    """A norm of rows: each divided by the root of the mean of its squares, in float32, and scaled."""

    eps: float
    """What is added to that mean."""
    scaling: Scaling

    def __call__(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Rows `[…, width]` scaled by weight `[width]`, in the dtype of the rows, by torch's functions."""
        wide = rows.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.scaling is Scaling.ROUNDED:
            return weight * normed.to(rows.dtype)
        factor = weight.float() + (1.0 if self.scaling is Scaling.WIDE_FROM_ONE else 0.0)
        return (normed * factor).to(rows.dtype)


@dataclass(frozen=True)
class LayerNorm:
    """A norm of rows: each less its mean, divided by its standard deviation, scaled and shifted, in float32."""

    eps: float
    """What is added to the variance."""
    scaling = Scaling.WIDE

    def __call__(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Rows `[…, width]` scaled by weight and shifted by bias `[width]`, all of one dtype, by torch's function."""
        return F.layer_norm(rows, weight.shape, weight, bias, self.eps)


Kernel = Callable[[torch.Tensor, torch.Tensor, float, int, torch.Tensor | None], torch.Tensor]
"""Rows and weight of 16 bits of one dtype on the current device, eps, scaling, and the bias of a `LayerNorm`."""


@where_compiled
def kernel_for() -> Kernel:
    """Our kernel's function."""
    from engine.kernels.elementwise.norm_kernel import norm

    return norm
