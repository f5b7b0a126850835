"""A matrix of a quantized checkpoint: its parts, which are stored and moved unchanged, and its decoding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from engine.kernels.fused import Fused
from engine.kernels.packed.coded import Coded

CHUNK_ELEMENTS = 4 << 20
"""The most numbers that are unpacked at once: some take 16 bytes each while being unpacked."""

PLAIN = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of numbers that are not codes."""
Parts = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class PartForm:
    """One tensor of a packed matrix."""

    dtype: torch.dtype
    shape: torch.Size

    @property
    def num_bytes(self) -> int:
        """The size of the tensor in bytes."""
        return self.shape.numel() * self.dtype.itemsize


class PackedMatrix(ABC):
    """A matrix `[rows, columns]` in the parts of one format.

    Numbers are decoded in the dtype in which the format's own library computes, and then rounded to the model's.
    """

    names: ClassVar[tuple[str, ...]]
    """The parts that every matrix has."""
    optional: ClassVar[tuple[str, ...]] = ()
    unread: ClassVar[tuple[str, ...]] = ()
    """Further tensors that a checkpoint may contain and that affect no number of the matrix."""

    def __init__(self, shape: torch.Size, parts: Mapping[str, PartForm]) -> None:
        """Raises `ValueError` for parts that do not form such a matrix."""
        self.rows, self.columns = shape
        self.parts = parts

    def fill(self, parts: Parts, matrices: torch.Tensor) -> None:
        """Decode several such matrices, of parts `[matrices, ...]`, into `[matrices, rows, columns]`.

        The target need not be contiguous.
        """
        for index, matrix in enumerate(matrices):
            self._fill({name: part[index] for name, part in parts.items()}, matrix)

    def _expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `ValueError` unless parts have these shapes."""
        for name, shape in shapes.items():
            if name in self.parts and tuple(self.parts[name].shape) != shape:
                raise ValueError(f"{name} is {list(self.parts[name].shape)} instead of {list(shape)}")

    def _expect_dtype(self, name: str, *dtypes: torch.dtype) -> None:
        """Raise `ValueError` unless a part has one of these dtypes."""
        if name in self.parts and self.parts[name].dtype not in dtypes:
            told = " or ".join(map(type_name, dtypes))
            raise ValueError(f"{name} is {type_name(self.parts[name].dtype)}, not {told}")

    def _expect_plain(self, name: str) -> None:
        """Raise `ValueError` for scales that are codes themselves."""
        if self.parts[name].dtype not in PLAIN:
            raise ValueError(f"{name} is {type_name(self.parts[name].dtype)}, no plain numbers")

    def _fill(self, parts: Parts, matrix: torch.Tensor) -> None:
        raise NotImplementedError


class RowsApart(PackedMatrix):
    """A matrix whose rows can be unpacked independently, so that several matrices are unpacked in the same calls."""

    def fill(self, parts: Parts, matrices: torch.Tensor) -> None:
        """Decode several such matrices, as `PackedMatrix.fill` does."""
        _fill_rows(matrices, self, parts)

    def fill_by_torch(self, parts: Parts, matrices: torch.Tensor) -> None:
        """Decode with torch's functions, on any device."""
        tables = self._tables(parts)
        whole = max(1, CHUNK_ELEMENTS // (self.rows * self.columns))  # matrices at once
        for first in range(0, len(matrices), whole):
            which = slice(first, min(first + whole, len(matrices)))
            for rows in chunks(self.rows, self.columns):
                cut = {
                    name: table[which] if table.shape[1] == 1 else table[which, rows] for name, table in tables.items()
                }
                matrices[which, rows].copy_(self._numbers(cut, matrices.dtype))

    def coded(self, parts: Parts, dtype: torch.dtype) -> Coded | None:
        """The input of the decoding kernel for a target of `dtype`; None for a format that it does not support."""
        return None

    @abstractmethod
    def _tables(self, parts: Parts) -> dict[str, torch.Tensor]:
        """Parts as `[matrices, rows, ...]`, or `[matrices, 1, ...]` where one row applies to all."""

    @abstractmethod
    def _numbers(self, tables: Parts, dtype: torch.dtype) -> torch.Tensor:
        """The decoded numbers `[matrices, rows, columns]` of some matrices and rows, for a target of `dtype`."""


def _fill_by_torch(matrices: torch.Tensor, form: RowsApart, parts: Parts) -> None:
    form.fill_by_torch(parts, matrices)


def _kernel() -> Callable[..., None]:
    from engine.kernels.packed.expand_kernel import expand

    def fill(matrices: torch.Tensor, form: RowsApart, parts: Parts) -> None:
        coded = form.coded(parts, matrices.dtype)
        if coded is None:
            form.fill_by_torch(parts, matrices)
        else:
            expand(coded, matrices)

    return fill


_fill_rows = Fused(_fill_by_torch, _kernel)


def type_name(dtype: torch.dtype) -> str:
    """The dtype's name in messages."""
    return str(dtype).removeprefix("torch.")


def word_bits(words: int, count: int) -> int:
    """The bits of each of `count` numbers in 32-bit `words`; `ValueError` unless 2, 4 or 8."""
    bits = words * 32 // count
    if bits not in (2, 4, 8):
        raise ValueError(f"{bits} bits a number; 2, 4 and 8 can be run")
    return bits


def chunks(count: int, width: int) -> Iterator[slice]:
    """Slices of `count` rows of `width` numbers, each of at most `CHUNK_ELEMENTS` numbers."""
    size = max(1, CHUNK_ELEMENTS // width)
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack int32 words `[..., columns]` into integers int32 `[..., columns * 32 / bits]`, low bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def scaled(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """`(codes - zeros) * scales`, computed in `dtype`: `[..., columns]` and `[..., groups]` -> `[..., columns]`."""
    scales = scales.to(dtype)
    numbers = codes.to(dtype).unflatten(-1, (scales.shape[-1], -1))
    if zeros is not None:
        numbers = numbers - zeros.to(dtype)[..., None]
    products: torch.Tensor = numbers * scales[..., None]
    return products.flatten(-2)
