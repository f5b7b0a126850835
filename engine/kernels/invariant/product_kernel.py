"""The Triton kernel for 16-bit matrix products whose rows do not depend on each other, on GPUs that have Triton.

Every element is the sum of its products in the same order, over the whole inner dimension, by the same instructions:
tiles of other sizes change where a number is computed, not how. (Libraries split the inner dimension, or choose other
instructions, by the number of rows.)
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from engine.memory import accelerator

_INNER = 64
"""The number of products that are summed per step; the same for all tiles."""
_GROUP = 8
"""The number of row tiles whose programs follow each other."""
_TILES = ((16, 16, 64, 4, 5), (64, 64, 64, 4, 4), (512, 128, 128, 8, 4))
"""Tile configurations up to a number of rows: rows and columns, warps, and pipeline stages; the fastest on an H200."""
_LARGE_TILE = 256, 128, 8, 3


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    rows,
    matrices,
    bias,
    result,
    count,
    columns,
    inner,
    row_batch,
    row_stride,
    row_step,
    matrix_batch,
    matrix_stride,
    matrix_step,
    result_batch,
    result_stride,
    has_bias: tl.constexpr,
    fits: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_inner: tl.constexpr,
    group: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    # Neighbouring programs share rows and columns, which are then in the card's cache.
    program = tl.program_id(0)
    down, across = tl.cdiv(count, tile_rows), tl.cdiv(columns, tile_columns)
    first_row = program // (group * across) * group
    height = min(down - first_row, group)
    row_tile = first_row + program % (group * across) % height
    column_tile = program % (group * across) // height
    row = (row_tile * tile_rows + tl.arange(0, tile_rows)).to(tl.int64)
    column = (column_tile * tile_columns + tl.arange(0, tile_columns)).to(tl.int64)
    step = tl.arange(0, tile_inner)
    # Rows and columns beyond the last are computed from the first ones, and not stored.
    row_from = tl.where(row < count, row, 0)
    column_from = tl.where(column < columns, column, 0)
    left = rows + batch * row_batch + row_from[:, None] * row_stride + step[None, :] * row_step
    right = matrices + batch * matrix_batch + step[:, None] * matrix_stride + column_from[None, :] * matrix_step
    sums = tl.zeros((tile_rows, tile_columns), dtype=tl.float32)
    for first in range(0, inner, tile_inner):
        if fits:
            a = tl.load(left)
            b = tl.load(right)
        else:
            inside = step < inner - first
            a = tl.load(left, mask=inside[None, :], other=0.0)
            b = tl.load(right, mask=inside[:, None], other=0.0)
        sums = tl.dot(a, b, sums)
        left += tile_inner * row_step
        right += tile_inner * matrix_stride
    if has_bias:
        sums += tl.load(bias + column_from).to(tl.float32)[None, :]
    place = result + batch * result_batch + row[:, None] * result_stride + column[None, :]
    tl.store(place, sums.to(result.dtype.element_ty), mask=(row < count)[:, None] & (column < columns)[None, :])


def multiply(rows: torch.Tensor, matrices: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Rows `[b, n, k]` times matrices `[b, k, m]`, plus bias `[m]`: `[b, n, m]` of `dtype`; on the current device.

    Factors have 16 bits and any strides; sums are float32 and rounded once.
    """
    num_batches, count, inner = rows.shape
    columns = matrices.shape[2]
    result = torch.empty(num_batches, count, columns, dtype=dtype, device=rows.device)
    if not result.numel():
        return result
    sizes = _sizes(next((tile for tile in _TILES if count <= tile[0]), _LARGE_TILE)[-4:], rows.device, rows.itemsize)
    grid = (-(-count // sizes["tile_rows"]) * -(-columns // sizes["tile_columns"]), num_batches)
    strides = (*rows.stride(), *matrices.stride(), *result.stride()[:2])
    kernel: Any = _kernel
    kernel[grid](
        rows,
        matrices,
        result if bias is None else bias,
        result,
        count,
        columns,
        inner,
        *strides,
        has_bias=bias is not None,
        fits=inner % _INNER == 0,
        tile_inner=_INNER,
        **sizes,
    )
    return result


@cache
def _sizes(tile: tuple[int, ...], device: torch.device, number_bytes: int) -> dict[str, int]:
    """The tile sizes that give all processors of a GPU work and fit into shared memory."""
    tile_rows, tile_columns, warps, stages = tile
    stage_bytes = (tile_rows + tile_columns) * _INNER * number_bytes
    most = accelerator.shared_memory(device) // stage_bytes
    sizes = {"tile_rows": tile_rows, "tile_columns": tile_columns, "group": _GROUP}
    return {**sizes, "num_warps": warps, "num_stages": max(1, min(stages, most))}
