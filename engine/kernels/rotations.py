"""Rotary position embeddings as families write them, and one kernel in their place where a device can have it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.kernels.compiled import where_compiled


def rotated(
    query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys `[1, heads, rows, dim]`, turned by angles whose cosine and sine are `[1, rows, turned]`.

    Of the first `turned` numbers of a head, those of the first half are turned with those of the second one; the others
    stay. Products and sums are rounded to the dtype of all four, one by one.
    """
    return _turned(query, cosine, sine), _turned(key, cosine, sine)


def _turned(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    width = cosine.shape[-1]
    first, second, rest = heads[..., : width // 2], heads[..., width // 2 : width], heads[..., width:]
    cosine, sine = cosine[:, None], sine[:, None]
    turned = heads[..., :width] * cosine + torch.cat((-second, first), dim=-1) * sine
    return torch.cat((turned, rest), dim=-1)


Kernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    tuple[torch.Tensor, torch.Tensor],
]
"""`rotated` for four tensors of 16 bits of one dtype on the current device."""


@where_compiled
def kernel_for() -> Kernel:
    """Our kernel's function."""
    from engine.kernels.rotation_kernel import rotate

    return rotate
