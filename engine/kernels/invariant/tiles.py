"""Products by a library in tiles of one size: it uses the same kernel for the same sizes.

A kernel may still treat the rows of a tile differently, by the remainder of its own tiles or by the thread that
computes them. So each size is tested when it first occurs; where a row's position matters, a tile is one row.
"""

from __future__ import annotations

from typing import Any

import torch

_TILE = {"cpu": 32}
_OTHER_TILE = 64
"""The rows of a tile on device types without a size of their own."""
_MATRICES = 8
"""The number of matrices in one call of a batched product."""
_ALIGNMENT = 64
"""The alignment of torch's allocations, in bytes, at least."""
_LEAST_TRIES = 6
_MOST_TRIES = 64
_LEAST_COMPARED = 1 << 17
"""The least numbers of products to compare: in 16 bits most numbers agree even if they are summed in another order."""

_Case = tuple[torch.device, torch.dtype, torch.dtype, torch.Size, torch.Size, tuple[int, ...]]


class Tiles:
    """Products whose rows depend neither on each other nor on their positions."""

    def __init__(self) -> None:
        self._is_even: dict[_Case, bool] = {}
        """Whether a row's position does not matter, by sizes, layout and dtypes."""

    def mm(self, rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Rows `[n, k]` times matrix `[k, m]`: `[n, m]`."""
        return self._in_tiles(rows, matrix, rows.dtype)

    def bmm(self, rows: torch.Tensor, matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows `[b, n, k]` times matrices `[b, k, m]`: `[b, n, m]` of `dtype`, which may be wider than theirs."""
        parts = []
        for first in range(0, rows.shape[0], _MATRICES):
            given, of = rows[first : first + _MATRICES], matrices[first : first + _MATRICES]
            # Libraries choose a kernel by how many matrices there are, and how they lie, too.
            filled = _filled(given, _MATRICES, 0), _filled(of, _MATRICES, 0).contiguous()
            parts.append(self._in_tiles(*filled, dtype)[: len(given)])
        return torch.cat(parts) if parts else rows.new_empty(0, rows.shape[1], matrices.shape[2], dtype=dtype)

    def _in_tiles(self, rows: torch.Tensor, by: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        tile, count = _TILE.get(rows.device.type, _OTHER_TILE), rows.shape[-2]
        if not self._is_tile_even(rows, by, dtype, tile):
            return _one_by_one(rows, by, dtype)
        result = rows.new_empty(*rows.shape[:-1], by.shape[-1], dtype=dtype)
        for first in range(0, count, tile):
            part = _filled(rows.narrow(-2, first, min(tile, count - first)), tile, -2)
            result[..., first : first + tile, :] = _product(part, by, dtype)[..., : count - first, :]
        return result

    def _is_tile_even(self, rows: torch.Tensor, by: torch.Tensor, dtype: torch.dtype, tile: int) -> bool:
        shape = torch.Size([*rows.shape[:-2], tile, rows.shape[-1]])
        case = rows.device, rows.dtype, dtype, shape, by.shape, by.stride()
        found = self._is_even.get(case)
        if found is None:
            if by.ndim == 2 and not bool(by.any()):  # weights that are still to come; zeros have no order
                return True
            found = self._is_even[case] = _is_even(shape, rows, by, dtype)
        return found


def _is_even(shape: torch.Size, like: torch.Tensor, by: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether random rows, moved to other positions of a tile of this shape with their matrices, keep their bits."""
    generator = torch.Generator(like.device).manual_seed(0)
    if len(shape) == 3:  # few of them may be filled; single matrices are large, and fixed
        by = torch.randn(by.shape, device=by.device, generator=generator).to(by.dtype)
    compared = shape[:-1].numel() * by.shape[-1]
    tries = min(_MOST_TRIES, max(_LEAST_TRIES, -(-_LEAST_COMPARED // max(1, compared))))
    for number in range(tries):
        part = torch.randn(shape, device=like.device, generator=generator).to(like.dtype)
        product = _product(part, by, dtype)
        by_row, by_matrix = 1 + number * 5 % (shape[-2] - 1), number % 3
        moved, matrices = part.roll(by_row, -2), by
        if len(shape) == 3 and by_matrix:
            moved, matrices = moved.roll(by_matrix, 0), by.roll(by_matrix, 0)
        again = _product(moved, matrices, dtype).roll(-by_row, -2)
        again = again.roll(-by_matrix, 0) if len(shape) == 3 and by_matrix else again
        if not bool((again.eq(product) | product.isnan()).all()):
            return False
    return True


def _one_by_one(rows: torch.Tensor, by: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Compute row by row, and matrix by matrix: slow, but there is only one position."""
    result = rows.new_empty(*rows.shape[:-1], by.shape[-1], dtype=dtype)
    several = rows.ndim == 3
    for index in range(rows.shape[0] if several else 1):
        part, matrix, place = (rows[index], by[index], result[index]) if several else (rows, by, result)
        for row in range(len(part)):
            place[row] = _product(part[row : row + 1], matrix, dtype)[0]
    return result


def _product(rows: torch.Tensor, by: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`torch.mm` or `torch.bmm`, in `dtype`; on CUDA at the rate of 16 bits.

    Rows begin at the start of an allocation: libraries also choose by alignment.
    """
    if rows.data_ptr() % _ALIGNMENT or not rows.is_contiguous():
        rows = rows.clone(memory_format=torch.contiguous_format)
    if dtype != rows.dtype and not (rows.device.type == "cuda" and torch.version.hip is None):
        rows, by = rows.to(dtype), by.to(dtype)
    multiply: Any = torch.mm if rows.ndim == 2 else torch.bmm
    product: torch.Tensor = multiply(rows, by) if dtype == rows.dtype else multiply(rows, by, out_dtype=dtype)
    return product


def _filled(numbers: torch.Tensor, count: int, dim: int) -> torch.Tensor:
    """`numbers` padded with zeros to `count` along `dim`."""
    missing = count - numbers.shape[dim]
    if missing <= 0:
        return numbers
    zeros = numbers.new_zeros([missing if at == dim % numbers.ndim else size for at, size in enumerate(numbers.shape)])
    return torch.cat((numbers, zeros), dim=dim)
