"""Triton kernels for experts of a mixture in 16 bits, on cards that have Triton: two products and a sum.

A number of a product is the sum of its terms in the same order, by the same instructions, in tiles of any size: what a
row becomes depends neither on the rows beside it nor on how many there are (`engine.kernels.invariant.product_kernel`
rests on the same). Weighted sums are taken token by token, in the order of its choices, without atomics.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from engine.kernels.grouped.gating import Gating
from engine.kernels.grouped.matrices import Matrices
from engine.kernels.grouped.stack import Stack
from engine.memory import accelerator

_INNER = 64
"""Products that are summed at a time; the same for all tiles."""
_TILES = ((16, 16, 64, 4, 5), (64, 64, 128, 4, 4))
"""Up to so many rows of an expert on average: the tile's rows and columns, warps, and stages that are loaded ahead."""
_LARGE_TILE = 128, 256, 8, 3
_SUMMED = 1024
"""Columns of a token that one program sums up."""


@triton.jit  # type: ignore[untyped-decorator]
def _tile_kernel(starts, tiles, count, rows: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which expert's rows a tile has: expert, first row, and end of the expert's rows; nothing beyond the last tile."""
    tile = tl.program_id(0)
    expert = tl.arange(0, width)
    first = tl.load(starts + expert, mask=expert < count, other=0)
    end = tl.load(starts + expert + 1, mask=expert < count, other=0)
    num_tiles = (end - first + rows - 1) // rows
    mine = tl.sum(tl.where((tl.cumsum(num_tiles, 0) <= tile) & (expert < count), 1, 0), 0)
    before = tl.sum(tl.where(expert < mine, num_tiles, 0), 0)
    row = tl.sum(tl.where(expert == mine, first, 0), 0) + (tile - before) * rows
    tl.store(tiles + 3 * tile, mine)
    tl.store(tiles + 3 * tile + 1, row)
    tl.store(tiles + 3 * tile + 2, tl.sum(tl.where(expert == mine, end, 0), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _gated(gate, value, limit, alpha, kind: tl.constexpr, has_alpha: tl.constexpr):  # type: ignore[no-untyped-def]
    """As `Gating` does it, rounded wherever torch's own functions round; what is no number stays none."""
    gate = tl.where(gate > limit, limit, gate).to(kind).to(tl.float32)
    value = tl.where(value > limit, limit, tl.where(value < -limit, -limit, value)).to(kind).to(tl.float32)
    if has_alpha:
        scaled = (gate * alpha).to(kind).to(tl.float32)
        share = (1.0 / (1.0 + tl.exp(-scaled))).to(kind).to(tl.float32)
        return (value + 1.0).to(kind).to(tl.float32) * (gate * share).to(kind).to(tl.float32)
    return (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32) * value


@triton.jit(do_not_specialize=["first_expert", "end_expert"])  # type: ignore[untyped-decorator]
def _product_kernel(  # type: ignore[no-untyped-def]
    rows,
    order,
    tiles,
    first_expert,
    end_expert,
    matrices,
    bias,
    result,
    columns,
    inner,
    row_stride,
    row_step,
    matrix_batch,
    matrix_stride,
    matrix_step,
    to_second,
    bias_batch,
    bias_step,
    bias_to_second,
    result_stride,
    limit,
    alpha,
    rows_of: tl.constexpr,
    is_gated: tl.constexpr,
    is_interleaved: tl.constexpr,
    has_alpha: tl.constexpr,
    has_bias: tl.constexpr,
    fits: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_inner: tl.constexpr,
):
    # Of two numbers that become one, both are computed here: side by side, or in two tiles.
    stored_columns: tl.constexpr = tile_columns // 2 if is_interleaved else tile_columns
    is_twice: tl.constexpr = is_gated and not is_interleaved
    across = tl.cdiv(columns, stored_columns)
    tile, column_tile = tl.program_id(0) // across, tl.program_id(0) % across
    expert = tl.load(tiles + 3 * tile).to(tl.int64)
    first, end = tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    if (first >= end) | (expert < first_expert) | (expert >= end_expert):  # beyond the last, or of others
        return
    place = first + tl.arange(0, tile_rows)
    inside = place < end
    place = tl.where(inside, place, first)  # rows and columns beyond the last are computed from others, and not stored
    pair = tl.load(order + place).to(tl.int64)
    # Tokens are gathered on the way in; what was made of them lies in the order of experts, and is put back at last.
    if rows_of:
        source, target = pair // rows_of, place.to(tl.int64)
    else:
        source, target = place.to(tl.int64), pair
    column = column_tile * tile_columns + tl.arange(0, tile_columns)
    # Neighbours stay neighbours, so that they are loaded together.
    column_from = (column % (2 * columns if is_interleaved else columns)).to(tl.int64)
    step = tl.arange(0, tile_inner)
    left = rows + source[:, None] * row_stride + step[None, :] * row_step
    right = (
        matrices
        + (expert - first_expert) * matrix_batch
        + step[:, None] * matrix_stride
        + column_from[None, :] * matrix_step
    )
    sums = tl.zeros((tile_rows, tile_columns), dtype=tl.float32)
    seconds = tl.zeros((tile_rows, tile_columns), dtype=tl.float32)
    for start in range(0, inner, tile_inner):
        if fits:
            a = tl.load(left)
            b = tl.load(right)
        else:
            within = step < inner - start
            a = tl.load(left, mask=within[None, :], other=0.0)
            b = tl.load(right, mask=within[:, None], other=0.0)
        sums = tl.dot(a, b, sums)
        if is_twice:
            if fits:
                c = tl.load(right + to_second)
            else:
                c = tl.load(right + to_second, mask=(step < inner - start)[:, None], other=0.0)
            seconds = tl.dot(a, c, seconds)
        left += tile_inner * row_step
        right += tile_inner * matrix_stride
    kind = result.dtype.element_ty
    if has_bias:
        biases = bias + expert * bias_batch + column_from * bias_step
        sums += tl.load(biases).to(tl.float32)[None, :]
        if is_twice:
            seconds += tl.load(biases + bias_to_second).to(tl.float32)[None, :]
    if is_gated:
        if is_interleaved:
            pairs = tl.reshape(sums.to(kind), (tile_rows, stored_columns, 2))
            gate, value = tl.split(pairs)
        else:
            gate, value = sums.to(kind), seconds.to(kind)
        sums = _gated(gate.to(tl.float32), value.to(tl.float32), limit, alpha, kind, has_alpha)
    column = column_tile * stored_columns + tl.arange(0, stored_columns)
    stored = result + target[:, None] * result_stride + column[None, :]
    tl.store(stored, sums.to(kind), mask=inside[:, None] & (column < columns)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _sum_kernel(  # type: ignore[no-untyped-def]
    places,
    index,
    weights,
    result,
    width,
    count,
    index_stride,
    index_step,
    weight_stride,
    weight_step,
    num_choices: tl.constexpr,
    is_narrow: tl.constexpr,
    block: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    kind = result.dtype.element_ty
    sums = tl.zeros((block,), dtype=tl.float32)
    for choice in tl.static_range(num_choices):
        expert = tl.load(index + token * index_stride + choice * index_step)
        weight = tl.load(weights + token * weight_stride + choice * weight_step).to(tl.float32)
        term = tl.load(places + (token * num_choices + choice) * width + column, mask=inside, other=0.0).to(tl.float32)
        term *= weight
        if is_narrow:  # as torch rounds the product of two numbers of 16 bits
            term = term.to(kind).to(tl.float32)
        sums += tl.where(expert < count, term, 0.0)
    tl.store(result + token * width + column, sums.to(kind), mask=inside)


def mixture(matrices: Matrices, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """As `by_torch.mixture`, for numbers of 16 bits of one dtype, on the current device; the host waits for nothing."""
    num_tokens, num_choices = index.shape
    num_pairs = index.numel()
    result = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    if not result.numel():
        return result
    # Fewer digits are sorted in fewer passes.
    kind = torch.int16 if matrices.count < torch.iinfo(torch.int16).max else torch.int32
    sorted_experts, order = index.flatten().to(kind).sort(stable=True)
    experts = torch.arange(matrices.count + 1, dtype=kind, device=hidden.device)
    starts = torch.searchsorted(sorted_experts, experts, out_int32=True)
    sizes = _sizes(-(-num_pairs // matrices.count), hidden.device, hidden.itemsize)
    tiles = _tiles(starts, num_pairs, sizes["tile_rows"])
    width = matrices.first.shape[2] if matrices.gating is None else matrices.second.shape[1]
    inner = torch.empty(num_pairs, width, dtype=hidden.dtype, device=hidden.device)
    first = matrices.first, matrices.first_bias
    _multiply(hidden, order, tiles, *first, inner, sizes, rows_of=num_choices, gating=matrices.gating)
    if matrices.gating is None:
        inner = matrices.activation(inner)
    places = torch.empty(num_pairs, hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    _multiply(inner, order, tiles, matrices.second, matrices.second_bias, places, sizes)
    kernel: Any = _sum_kernel
    kernel[(num_tokens, -(-hidden.shape[1] // _SUMMED))](
        places,
        index,
        weights,
        result,
        hidden.shape[1],
        matrices.count,
        *index.stride(),
        *weights.stride(),
        num_choices=num_choices,
        is_narrow=weights.dtype == hidden.dtype,
        block=_SUMMED,
    )
    return result


def _tiles(starts: torch.Tensor, num_pairs: int, rows: int) -> torch.Tensor:
    """Of each tile that there may be: expert, first row, end of the expert's rows; int32 `[tiles, 3]`."""
    count = len(starts) - 1
    most = num_pairs // rows + min(count, num_pairs)  # of each expert one tile that is not full
    tiles = torch.empty(most, 3, dtype=torch.int32, device=starts.device)
    kernel: Any = _tile_kernel
    kernel[(most,)](starts, tiles, count, rows=rows, width=triton.next_power_of_2(count))
    return tiles


def _multiply(
    rows: torch.Tensor,
    order: torch.Tensor,
    tiles: torch.Tensor,
    stack: Stack,
    bias: torch.Tensor | None,
    result: torch.Tensor,
    sizes: dict[str, int],
    *,
    rows_of: int = 0,
    gating: Gating | None = None,
) -> None:
    """Fill `result` with products of rows in the order of their experts, a group of these at a time.

    gating: what is done with the products before they are stored. rows_of: places of `order` that belong to each of
    `rows`, which are gathered; 0: they are in that order already, and what becomes of them is put where `order` says.
    """
    columns, inner = result.shape[1], stack.shape[1]
    is_interleaved = gating is not None and gating.is_interleaved
    if gating is not None and not is_interleaved:
        sizes = {**sizes, "tile_columns": sizes["tile_columns"] // 2}
    stored_columns = sizes["tile_columns"] // 2 if is_interleaved else sizes["tile_columns"]
    kernel: Any = _product_kernel
    for group in stack.groups():
        matrices = stack.take(*group)
        kernel[(len(tiles) * -(-columns // stored_columns),)](
            rows,
            order,
            tiles,
            *group,
            matrices,
            result if bias is None else bias,
            result,
            columns,
            inner,
            *rows.stride(),
            *matrices.stride(),
            columns * matrices.stride(2),
            *((0, 0, 0) if bias is None else (*bias.stride(), columns * bias.stride(1))),
            result.stride(0),
            float("inf") if gating is None else gating.limit,
            0.0 if gating is None or gating.alpha is None else gating.alpha,
            rows_of=rows_of,
            is_gated=gating is not None,
            is_interleaved=is_interleaved,
            has_alpha=gating is not None and gating.alpha is not None,
            has_bias=bias is not None,
            fits=inner % _INNER == 0,
            tile_inner=_INNER,
            **sizes,
        )


@cache
def _sizes(rows: int, device: torch.device, number_bytes: int) -> dict[str, int]:
    """Of tiles for so many rows of an expert on average, so that they fit into a processor's memory."""
    tile_rows, tile_columns, warps, stages = next((tile for tile in _TILES if rows <= tile[0]), _LARGE_TILE)[-4:]
    stage_bytes = (tile_rows + tile_columns) * _INNER * number_bytes
    most = accelerator.shared_memory(device) // stage_bytes
    sizes = {"tile_rows": tile_rows, "tile_columns": tile_columns}
    return {**sizes, "num_warps": warps, "num_stages": max(1, min(stages, most))}
