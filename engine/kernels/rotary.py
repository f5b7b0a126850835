"""Rotary embeddings as most families write them, and one kernel in their place where a device can have it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from engine.memory import accelerator


def rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """States `[…, heads, rows, dim]` turned by `[…, rows, width]`, by torch's functions, each rounded to the dtype.

    Numbers turn with those half a row away. width: dim, or half of it where both halves turn by the same.
    """
    if 2 * cos.shape[-1] == states.shape[-1]:
        cos, sin = (torch.cat((x, x), dim=-1) for x in (cos, sin))
    first, second = states.chunk(2, dim=-1)
    return states * cos.unsqueeze(-3) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(-3)


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`rotated` for states `[1, heads, rows, dim]` of 16 bits of one dtype on the current device, of an even dim."""


@cache
def kernel_for(device: torch.device) -> Kernel | None:
    """Our kernel's function, where Triton compiles for the device."""
    if not accelerator.runs_triton(device):
        return None
    try:
        from engine.kernels.rotary_kernel import rotate
    except ImportError:  # torch without Triton
        return None
    return rotate
