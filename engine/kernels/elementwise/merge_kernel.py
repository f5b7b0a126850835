"""The Triton kernel that merges attention over a prefix with attention over own tokens.

With torch's functions it takes four kernels, the last of which reads one weight per head and row for every element. It
rounds where torch's functions round, and needs an accelerator with Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_BLOCK = 2048
"""The approximate number of elements that one program takes."""


@triton.jit(do_not_specialize=["count", "own_head", "shared_head"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    output,
    shared,
    own_sums,
    shared_sums,
    count,
    heads,
    own_head,
    shared_head,
    dim: tl.constexpr,
    block_rows: tl.constexpr,
    block_dim: tl.constexpr,
):
    # A row of a head after the other, as they lie in memory.
    place = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)
    row, head = place // heads, place % heads
    there = row < count
    own_sum = tl.load(own_sums + head * own_head + row, mask=there, other=0.0)
    shared_sum = tl.load(shared_sums + head * shared_head + row, mask=there, other=0.0)
    weight = 1.0 / (1.0 + tl.exp(own_sum - shared_sum))
    kind = output.dtype.element_ty
    weight = weight.to(kind).to(tl.float32)[:, None]
    column = tl.arange(0, block_dim)[None, :]
    inside = there[:, None] & (column < dim)
    at = place[:, None] * dim + column
    own = tl.load(output + at, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(shared + at, mask=inside, other=0.0).to(tl.float32)
    apart = other - own
    merged = tl.where(weight < 0.5, own + weight * apart, other - apart * (1.0 - weight))
    tl.store(output + at, merged.to(kind), mask=inside)


def merge_parts(
    output: torch.Tensor, logsumexp: torch.Tensor, shared: torch.Tensor, shared_logsumexp: torch.Tensor
) -> None:
    """Merge in place into `output` `[rows, heads, dim]`, as `merges.merge` does.

    Both outputs have 16 bits and are contiguous, on the current device; log-sum-exps `[heads, rows]` are float32, with
    the rows of a head adjacent.
    """
    rows, heads, dim = output.shape
    if not output.numel():
        return
    block_dim = triton.next_power_of_2(dim)
    block_rows = max(1, _BLOCK // block_dim)
    kernel: Any = _kernel
    kernel[(triton.cdiv(rows * heads, block_rows),)](
        output,
        shared,
        logsumexp,
        shared_logsumexp,
        rows,
        heads,
        logsumexp.stride(0),
        shared_logsumexp.stride(0),
        dim=dim,
        block_rows=block_rows,
        block_dim=block_dim,
        num_warps=4,
    )
