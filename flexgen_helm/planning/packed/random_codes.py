"""Random codes of packed matrices: every number is finite, and all of a matrix have the requested magnitude."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from engine.kernels.packed.matrix import PartForm

if TYPE_CHECKING:
    from engine.weights.store import WeightStore

_FLOAT8_SIZE = 64.0
"""Root mean square of float8 codes: far from their largest, 448, and from the subnormal ones."""
_BLOCK_BYTES = 1 << 24
_SIZES = {torch.uint8: 2.93, torch.int32: 4.61, torch.int8: 73.9, torch.float8_e4m3fn: _FLOAT8_SIZE}
"""Root mean square of random codes, by the type that they are stored in: all four-bit floats are as likely (uint8), all
whole numbers of four bits (int32) and of eight (int8)."""
_SCALES = ("weight_scale", "weight_scale_inv", "scales")


class RandomCodes:
    """Parts of packed matrices, made of one random block that is repeated."""

    def __init__(self, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self._bytes = torch.randint(0, 256, (_BLOCK_BYTES,), dtype=torch.uint8, generator=random)
        floats = torch.randn(_BLOCK_BYTES // 4, generator=random).mul_(_FLOAT8_SIZE).clamp_(-448, 448)
        self._floats = floats.to(torch.float8_e4m3fn).view(torch.uint8)
        self._factors = torch.rand(_BLOCK_BYTES // 16, generator=random).mul_(0.8).add_(0.6)
        """Around 1."""
        self._made: dict[Any, torch.Tensor] = {}
        """Parts that were put in place: all layers have the same."""

    def part(self, name: str, forms: Mapping[str, PartForm], shape: torch.Size, size: float) -> torch.Tensor:
        """The part `name` of a matrix `shape` with these parts, whose numbers have the root mean square `size`.

        `shape` are the rows and columns of a matrix; the part may be of several such matrices at once.
        """
        form = forms[name]
        count = form.shape.numel()
        if name == "weight_shape":
            return torch.tensor([*shape], dtype=form.dtype)
        if name not in _SCALES:
            block = self._floats if form.dtype == torch.float8_e4m3fn else self._bytes
            return _repeated(block, form.num_bytes).view(form.dtype).view(form.shape)
        codes = next(each for other, each in forms.items() if other not in _SCALES)
        unit = size / _SIZES[codes.dtype] if not _is_eight_bits(codes, shape) else size / _SIZES[torch.int8]
        if form.dtype == torch.uint8:  # powers of two, stored as their exponents and 127: one of the two nearest
            exponent = 127 + math.floor(math.log2(unit))
            return (_repeated(self._bytes, count) & 1).add_(exponent).view(form.shape)
        return (_repeated(self._factors, count) * unit).to(form.dtype).view(form.shape)

    def fill(self, store: WeightStore, name: str) -> None:
        """Put a packed parameter of `store` in place: numbers near 1 / sqrt(columns)."""
        whole = store.model.packed[name]
        matrix = whole.matrix
        shape = torch.Size((matrix.rows, matrix.columns))
        for source, part in whole.parts.items():
            form = matrix.parts[part.name]
            of_all = PartForm(form.dtype, torch.Size((part.count, *form.shape)))
            kind = part.name, shape, of_all
            if kind not in self._made:
                self._made[kind] = self.part(part.name, {**matrix.parts, part.name: of_all}, shape, shape[1] ** -0.5)
            store.put_packed(name, source, self._made[kind])


def _is_eight_bits(codes: PartForm, shape: torch.Size) -> bool:
    """Whether words hold numbers of eight bits."""
    return codes.dtype == torch.int32 and codes.shape[-1] * 32 // shape[-1] == 8


def _repeated(block: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` numbers of a block that is repeated without end."""
    return block[:count].clone() if count <= len(block) else block.repeat(-(-count // len(block)))[:count]
