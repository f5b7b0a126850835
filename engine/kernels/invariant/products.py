"""Matrix products in which the bits of a row depend neither on the number of rows nor on the row's position."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.kernels import compiled
from engine.kernels.compiled import where_compiled
from engine.kernels.invariant.tiles import Tiles

_LIBRARY_TILES = tuple(1 << power for power in range(12, 3, -1))
"""The tile sizes, in rows, for which the library is used where it gives the bits of our own kernel."""
_LEAST = 256
"""Fewer rows are always padded to the smallest tile; it is the smallest size in which a row is one of several."""
_MOST_FILLED = 1.15
"""Tiles that would be larger than this many times the number of rows are not padded to."""
_COMPARED = 128
"""The number of rows of such a tile that are compared, at its beginning, middle and end."""
_LEAST_COMPARED = 1 << 17
"""The least numbers of a product to compare: fewer might agree although they are summed in another order."""
_VARIED = 1024
"""The number of a model's rows that are never all alike; random rows are used for fewer."""
_ALIGNMENT = 256
"""The coarsest memory alignment, in bytes, by which a library chooses kernels."""
_OURS: tuple[int, ...] = ()
"""The plan of a product that our own kernel computes."""

_Sizes = tuple[torch.device, torch.dtype, int, torch.Size, tuple[int, ...], bool, tuple[int, int]]
"""Device, dtype and number of the rows, the matrix's sizes and strides, whether there is a bias, and the alignment
of matrix and bias."""
_Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.dtype], torch.Tensor]


class Products:
    """Computes products of rows in tiles of fixed sizes: a library uses the same kernel for the same sizes.

    In 16 bits, on GPUs for which Triton compiles, our kernel takes any number of rows, and the library those of its
    tiles that were seen to have the same bits as the kernel's.
    """

    def __init__(self) -> None:
        self._tiles = Tiles()
        self._is_same: dict[_Sizes, bool] = {}
        """Whether the library has our kernel's bits, by sizes."""
        self._plans: dict[_Sizes, tuple[int, ...]] = {}

    def mm(self, rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Rows `[n, k]` times matrix `[k, m]`, plus bias `[m]` or `[n, m]`, in their dtype: `[n, m]`."""
        if bias is not None and bias.ndim != 1:
            return self.mm(rows, matrix) + bias
        own = _kernel_for(rows)
        if own is not None:
            return self._by_library_where_same(own, rows, matrix, bias)
        product = self._tiles.mm(rows, matrix)
        return product if bias is None else product + bias

    def bmm(self, rows: torch.Tensor, matrices: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Batched product: `[b, n, k]` times `[b, k, m]` -> `[b, n, m]`, of `dtype` or theirs."""
        dtype = dtype or rows.dtype
        if matrices.shape[1] == 1:  # a product each, which is added to nothing
            return rows.to(dtype) * matrices.to(dtype)
        own = _kernel_for(rows)
        return self._tiles.bmm(rows, matrices, dtype) if own is None else own(rows, matrices, None, dtype)

    def _by_library_where_same(
        self, own: _Kernel, rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        places = matrix.data_ptr() % _ALIGNMENT, 0 if bias is None else bias.data_ptr() % _ALIGNMENT
        count = rows.shape[0]
        case = rows.device, rows.dtype, count, matrix.shape, matrix.stride(), bias is None, places
        plan = self._plans.get(case)
        if plan is None:
            plan = self._plan(own, case, rows, matrix, bias)
            if bool(matrix.any()):  # else they are still to come, and any sums agree
                self._plans[case] = plan
            else:
                self._is_same.clear()
        if plan == _OURS:
            return own(rows.unsqueeze(0), matrix.unsqueeze(0), bias, rows.dtype).squeeze(0)
        if len(plan) == 1 and plan[0] > count:
            return _by_library(_widest(rows, plan[0]), matrix, bias).narrow(0, 0, count)
        if rows.data_ptr() % _ALIGNMENT or not rows.is_contiguous():
            rows = rows.clone(memory_format=torch.contiguous_format)
        if len(plan) == 1:
            return _by_library(rows, matrix, bias)
        result = rows.new_empty(count, matrix.shape[1])
        first = 0
        for tile in plan:
            part, place = rows[first : first + tile], result[first : first + tile]
            if len(part) == tile:
                _by_library(part, matrix, bias, out=place)
            else:
                place.copy_(_by_library(_widest(part, tile), matrix, bias)[: len(part)])
            first += tile
        return result

    def _plan(
        self, own: _Kernel, case: _Sizes, rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[int, ...]:
        """The consecutive tile sizes for the library; `_OURS` where one of them has other bits."""
        plan: list[int] = []
        left = len(rows)
        if any(size * rows.element_size() % _ALIGNMENT for size in matrix.shape):
            return _OURS
        while left > 0:
            wider = [tile for tile in _LIBRARY_TILES if left <= tile and (tile <= _MOST_FILLED * left or left < _LEAST)]
            plan.append(wider[-1] if wider else next(tile for tile in _LIBRARY_TILES if tile <= left))
            left -= plan[-1]
        for tile in plan:
            sizes = (*case[:2], tile, *case[3:])
            if sizes not in self._is_same:
                self._is_same[sizes] = _has_same_bits(own, rows, matrix, bias, tile)
            if not self._is_same[sizes]:
                return _OURS
        return tuple(plan)


def _has_same_bits(
    own: _Kernel, rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, tile: int
) -> bool:
    """Whether the library's product of `tile` rows equals our kernel's in so many numbers that it is no coincidence.

    Sums in another order, rounded to bfloat16, differ in one of some thousand numbers.
    """
    if tile < _VARIED:
        generator = torch.Generator(rows.device).manual_seed(0)
        part = torch.randn(tile, rows.shape[1], device=rows.device, generator=generator).to(rows.dtype)
    else:  # memory for as many more may not be there
        part = rows[:tile]
        part = _widest(part, tile) if len(part) < tile or part.data_ptr() % _ALIGNMENT else part
        tile = min(tile, len(rows))
    found = _by_library(part, matrix, bias)
    starts = sorted({0, max(0, tile // 2 - _COMPARED // 2), max(0, tile - _COMPARED)})
    if len(starts) * min(tile, _COMPARED) * matrix.shape[1] < _LEAST_COMPARED:
        return False
    pieces = ((part[at : min(at + _COMPARED, tile)], found[at : min(at + _COMPARED, tile)]) for at in starts)
    return all(torch.equal(own(given[None], matrix[None], bias, rows.dtype)[0], of) for given, of in pieces)


def _by_library(
    rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    return torch.mm(rows, matrix, out=out) if bias is None else torch.addmm(bias, rows, matrix, out=out)


def _widest(rows: torch.Tensor, count: int) -> torch.Tensor:
    """`rows` padded with arbitrary rows to `count`."""
    times, rest = divmod(count, rows.shape[0])
    if times == 1 and not rest:
        return rows
    return torch.cat((rows,) * times + ((rows.narrow(0, 0, rest),) if rest else ()))


def _kernel_for(rows: torch.Tensor) -> _Kernel | None:
    """Our own kernel, if it supports this dtype and device."""
    return _compiled_for(rows.device) if compiled.takes(rows) else None


@where_compiled
def _compiled_for() -> _Kernel:
    from engine.kernels.invariant.product_kernel import multiply

    return multiply
