"""Rotary position embeddings as model families write them, and the kernel that replaces them where possible."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.kernels.compiled import where_compiled


def rotated(
    query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, per_pair: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys `[1, heads, rows, dim]`, rotated by angles whose cosine and sine are `[1, rows, rotated dim]`.

    Within the first `turned` elements of a head, the first half is rotated with the second half; the others stay.
    Products and sums are rounded to the dtype of all four, one by one. per_pair: how often cosine and sine hold the
    value of each rotated pair; with 1 they are `[1, rows, turned / 2]`.
    """
    if per_pair == 1:
        cosine, sine = (torch.cat((table, table), dim=-1) for table in (cosine, sine))
    return _turned(query, cosine, sine), _turned(key, cosine, sine)


def _turned(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    width = cosine.shape[-1]
    first, second, rest = heads[..., : width // 2], heads[..., width // 2 : width], heads[..., width:]
    cosine, sine = cosine[:, None], sine[:, None]
    turned = heads[..., :width] * cosine + torch.cat((-second, first), dim=-1) * sine
    return torch.cat((turned, rest), dim=-1)


Kernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int],
    tuple[torch.Tensor, torch.Tensor],
]
"""The kernel's signature: `rotated` for four 16-bit tensors of one dtype on the current device."""


@where_compiled
def kernel_for() -> Kernel:
    """The kernel's function for a device; None without one."""
    from engine.kernels.elementwise.rotation_kernel import rotate

    return rotate
