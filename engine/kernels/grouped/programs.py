"""Triton programs for a mixture of experts in 16 bits: the expert of each tile, two products, and a sum.

An element of a product is the sum of its terms in the same order, by the same instructions, in tiles of any size: a
row's result depends neither on the other rows nor on their number (`engine.kernels.invariant.product_kernel` relies on
this, too). Weighted sums are taken token by token, in the order of its choices, without atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def find_tiles(starts, tiles, count, rows: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """Find the expert of each tile: expert, first row, and end of the expert's rows; empty beyond the last tile."""
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
    """Apply `Gating`, rounded wherever torch's own functions round; NaN stays NaN."""
    gate = tl.where(gate > limit, limit, gate).to(kind).to(tl.float32)
    value = tl.where(value > limit, limit, tl.where(value < -limit, -limit, value)).to(kind).to(tl.float32)
    if has_alpha:
        scaled = (gate * alpha).to(kind).to(tl.float32)
        share = (1.0 / (1.0 + tl.exp(-scaled))).to(kind).to(tl.float32)
        return (value + 1.0).to(kind).to(tl.float32) * (gate * share).to(kind).to(tl.float32)
    return (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32) * value


@triton.jit(do_not_specialize=["first_expert", "end_expert"])  # type: ignore[untyped-decorator]
def multiply_tile(  # type: ignore[no-untyped-def]
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
def sum_choices(  # type: ignore[no-untyped-def]
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
