"""Mixture of experts with Triton kernels, in 16 bits, on GPUs that have Triton."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton

from engine.kernels.grouped.gating import Gating
from engine.kernels.grouped.matrices import Matrices
from engine.kernels.grouped.programs import find_tiles, multiply_tile, sum_choices
from engine.kernels.grouped.stack import Stack
from engine.memory import accelerator

_INNER = 64
"""The number of products that are summed per step; the same for all tiles."""
_TILES = ((16, 16, 64, 4, 5), (64, 64, 128, 4, 4))
"""Tile configurations up to an average number of rows per expert: rows and columns, warps, and pipeline stages."""
_LARGE_TILE = 128, 256, 8, 3
Counts = Sequence[int] | None
"""The number of rows of each expert, where the host knows them."""
_SUMMED = 1024
"""The number of columns of a token that one program sums."""


def mixture(
    matrices: Matrices, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, counts: Counts = None
) -> torch.Tensor:
    """Like `by_torch.mixture`, for 16-bit numbers of one dtype, on the current device; the host waits for nothing."""
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
    _multiply(hidden, order, tiles, *first, inner, sizes, counts, rows_of=num_choices, gating=matrices.gating)
    if matrices.gating is None:
        inner = matrices.activation(inner)
    places = torch.empty(num_pairs, hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    _multiply(inner, order, tiles, matrices.second, matrices.second_bias, places, sizes, counts)
    kernel: Any = sum_choices
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
    """The expert, first row and end of the expert's rows for each possible tile; int32 `[tiles, 3]`."""
    count = len(starts) - 1
    most = num_pairs // rows + min(count, num_pairs)  # of each expert one tile that is not full
    tiles = torch.empty(most, 3, dtype=torch.int32, device=starts.device)
    kernel: Any = find_tiles
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
    counts: Counts,
    *,
    rows_of: int = 0,
    gating: Gating | None = None,
) -> None:
    """Fill `result` with products of rows in the order of their experts, for one group of experts at a time.

    gating: the gate applied to the products before they are stored. rows_of: the number of entries of `order` for each
    of `rows`, which are gathered; 0: rows are in that order already, and results are scattered by `order`.
    """
    columns, inner = result.shape[1], stack.shape[1]
    is_interleaved = gating is not None and gating.is_interleaved
    if gating is not None and not is_interleaved:
        sizes = {**sizes, "tile_columns": sizes["tile_columns"] // 2}
    stored_columns = sizes["tile_columns"] // 2 if is_interleaved else sizes["tile_columns"]
    kernel: Any = multiply_tile
    for group in stack.groups(counts):
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
    """The tile sizes for an average number of rows per expert, such that they fit into a processor's shared memory."""
    tile_rows, tile_columns, warps, stages = next((tile for tile in _TILES if rows <= tile[0]), _LARGE_TILE)[-4:]
    stage_bytes = (tile_rows + tile_columns) * _INNER * number_bytes
    most = accelerator.shared_memory(device) // stage_bytes
    sizes = {"tile_rows": tile_rows, "tile_columns": tile_columns}
    return {**sizes, "num_warps": warps, "num_stages": max(1, min(stages, most))}
