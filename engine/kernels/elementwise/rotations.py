"""Rotary position embeddings as families write them, and one kernel in their place where a device can have it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.kernels.compiled import where_compiled


def rotated(
    query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, per_pair: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys `[1, heads, rows, dim]`, turned by angles whose cosine and sine are `[1, rows, turned]`.

    Of the first `turned` numbers of a head, those of the first half are turned with those of the second one; the others
    stay. Products and sums are rounded to the dtype of all four, one by one. per_pair: how often cosine and sine have
    the number of a pair that is turned; of those that have it once (1), they are `[1, rows, turned / 2]`.
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
"""`rotated` for four tensors of 16 bits of one dtype on the current device."""


@where_compiled
def kernel_for() -> Kernel:
    """Our kernel's function."""
    from engine.kernels.elementwise.rotation_kernel import rotate

    return rotate
