"""Matrices as quantized checkpoints hold them: parts that are stored and moved as they are, and what they stand for."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from engine.memory.layout import Extent, lay_out

_CHUNK_ELEMENTS = 4 << 20
"""Numbers unpacked at once: some take 16 bytes each meanwhile."""
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each number of eight is in its word."""

Parts = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class PartForm:
    """One tensor of a packed matrix."""

    source: str
    """Its name in the checkpoint."""
    dtype: torch.dtype
    shape: torch.Size


class PackedMatrix(ABC):
    """A matrix `[rows, columns]` of a linear layer in the parts of one format.

    Stored bytes are the parts one after the other, aligned. Numbers come back in the type that the format's own library
    computes in, mostly that of its scales, and are rounded to the model's from there.
    """

    names: ClassVar[tuple[str, ...]]
    """Parts that every matrix has."""
    optional: ClassVar[tuple[str, ...]] = ()
    unread: ClassVar[tuple[str, ...]] = ()
    """Further tensors that a checkpoint may contain and that carry no additional information."""

    def __init__(self, shape: torch.Size, parts: Mapping[str, PartForm]) -> None:
        self.rows, self.columns = shape
        self.parts = parts
        sizes = {name: part.shape.numel() * part.dtype.itemsize for name, part in parts.items()}
        extents, self.num_bytes = lay_out(sizes)
        self._extents: dict[str, Extent] = {extent.name: extent for extent in extents}

    def first_byte(self, part: str) -> int:
        """Where a part begins in the stored bytes."""
        return self._extents[part].first

    def decode(self, stored: torch.Tensor, values: torch.Tensor) -> None:
        """Write the numbers that `stored` bytes stand for into flat `values`."""
        tensors = {}
        for name, part in self.parts.items():
            extent = self._extents[name]
            tensors[name] = stored[extent.first : extent.end].view(part.dtype).view(part.shape)
        self._fill(tensors, values.view(self.rows, self.columns))

    def _expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `ValueError` unless parts have these shapes."""
        for name, shape in shapes.items():
            if name in self.parts and tuple(self.parts[name].shape) != shape:
                raise ValueError(f"{name} is {list(self.parts[name].shape)} instead of {list(shape)}")

    @abstractmethod
    def _fill(self, parts: Parts, matrix: torch.Tensor) -> None: ...


class PackedIntegers(PackedMatrix):
    """compressed-tensors' pack-quantized: whole numbers of 2, 4 or 8 bits along a row; scales of groups or rows."""

    names = ("weight_packed", "weight_scale")
    optional = ("weight_zero_point",)
    unread = ("weight_shape",)

    def __init__(self, shape: torch.Size, parts: Mapping[str, PartForm]) -> None:
        super().__init__(shape, parts)
        self._bits = _bits(parts["weight_packed"].shape[-1], self.columns)
        groups = _groups(parts["weight_scale"].shape, shape)
        words = -(-self.rows * self._bits // 32)
        self._expect({"weight_packed": (self.rows, -(-self.columns * self._bits // 32))})
        self._expect({"weight_zero_point": (words, groups)})
        if parts["weight_packed"].dtype != torch.int32:
            raise ValueError(f"weight_packed is {parts['weight_packed'].dtype}, not int32")

    def _fill(self, parts: Parts, matrix: torch.Tensor) -> None:
        scales, middle = _as_columns(parts["weight_scale"]), 1 << (self._bits - 1)
        zeros: torch.Tensor | None = None
        if "weight_zero_point" in parts:
            zeros = _unpacked(parts["weight_zero_point"].t(), self._bits)[:, : self.rows].t().sub(middle)
        for rows in _chunks(self.rows, self.columns):
            codes = _unpacked(parts["weight_packed"][rows], self._bits)[:, : self.columns].sub_(middle)
            _scale(matrix[rows], codes, _rows_of(scales, rows), _rows_of(zeros, rows))


class ScaledNumbers(PackedMatrix):
    """compressed-tensors' int-quantized, float-quantized and naive-quantized: a small number each, and scales."""

    names = ("weight", "weight_scale")
    optional = ("weight_zero_point",)

    def __init__(self, shape: torch.Size, parts: Mapping[str, PartForm]) -> None:
        super().__init__(shape, parts)
        _groups(parts["weight_scale"].shape, shape)
        self._expect({"weight": (self.rows, self.columns), "weight_zero_point": tuple(parts["weight_scale"].shape)})
        if parts["weight"].dtype not in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2):
            raise ValueError(f"weight is {parts['weight'].dtype}, neither int8 nor float8")

    def _fill(self, parts: Parts, matrix: torch.Tensor) -> None:
        scales = _as_columns(parts["weight_scale"])
        zeros = _as_columns(parts["weight_zero_point"]) if "weight_zero_point" in parts else None
        for rows in _chunks(self.rows, self.columns):
            _scale(matrix[rows], parts["weight"][rows], _rows_of(scales, rows), _rows_of(zeros, rows))


class FourBitBlocks(PackedMatrix):
    """bitsandbytes' 4 bits (NF4, FP4): codes of a table, and the largest number of each block, itself coded or not."""

    names = ("weight", "weight.absmax", "weight.quant_map")
    optional = ("weight.nested_absmax", "weight.nested_quant_map")

    def __init__(self, shape: torch.Size, parts: Mapping[str, PartForm], state: bytes) -> None:
        """state: the JSON of the checkpoint's quant_state."""
        super().__init__(shape, parts)
        told = json.loads(state)
        self._block, self._nested_block = int(told["blocksize"]), int(told.get("nested_blocksize") or 1)
        self._offset = float(told.get("nested_offset") or 0.0)
        self._dtype: torch.dtype = getattr(torch, told["dtype"])
        count = shape.numel()
        if (
            list(told["shape"]) != list(shape)
            or parts["weight"].shape.numel() * parts["weight"].dtype.itemsize * 2 != count
        ):
            raise ValueError(f"quant_state tells of {told['shape']}, the layer has {list(shape)}")
        if count % self._block:
            raise ValueError(f"{count} numbers are no multiple of blocks of {self._block}")
        if ("weight.nested_absmax" in parts) != ("weight.nested_quant_map" in parts):
            raise ValueError("one of nested_absmax and nested_quant_map is missing")

    def _fill(self, parts: Parts, matrix: torch.Tensor) -> None:
        values, largest = matrix.view(-1), parts["weight.absmax"]
        if "weight.nested_absmax" in parts:
            nested = parts["weight.nested_absmax"].repeat_interleave(self._nested_block)[: len(largest)]
            largest = parts["weight.nested_quant_map"][largest.int()] * nested + self._offset
        codes, table = parts["weight"].flatten().view(torch.uint8), parts["weight.quant_map"]
        size = max(1, _CHUNK_ELEMENTS // self._block) * self._block
        for first in range(0, len(values), size):
            piece = codes[first // 2 : (first + size) // 2].int()
            numbers = table[torch.stack([piece >> 4, piece & 15], dim=1).flatten()].view(-1, self._block)
            numbers = numbers * largest[first // self._block :][: len(numbers), None]
            values[first : first + size].copy_(numbers.to(self._dtype).flatten())


class EightBitRows(PackedMatrix):
    """bitsandbytes' 8 bits (LLM.int8): int8, and the largest number of each row."""

    names = ("weight", "SCB")
    unread = ("weight_format",)

    def __init__(self, shape: torch.Size, parts: Mapping[str, PartForm]) -> None:
        super().__init__(shape, parts)
        self._expect({"weight": (self.rows, self.columns), "SCB": (self.rows,)})

    def _fill(self, parts: Parts, matrix: torch.Tensor) -> None:
        for rows in _chunks(self.rows, self.columns):  # 1 / 127, as bitsandbytes rounds it
            matrix[rows].copy_(parts["weight"][rows] * parts["SCB"][rows, None] * 7.874015718698502e-3)


class PackedColumns(PackedMatrix):
    """GPTQ: the transposed matrix in words along its columns; zeros along its rows; a group for each input."""

    names = ("qweight", "qzeros", "scales")
    optional = ("g_idx",)

    def __init__(self, shape: torch.Size, parts: Mapping[str, PartForm], *, group: int, zero_lacks: int) -> None:
        """group: inputs that share a scale, where there is no g_idx. zero_lacks: what stored zeros are less by."""
        super().__init__(shape, parts)
        self._bits, self._group = _bits(parts["qweight"].shape[0], self.columns), group
        # Added to words, not to numbers: it was taken off there, with what that borrows of the neighbour.
        self._zero_lacks = sum(zero_lacks << at for at in range(0, 32, self._bits))
        groups, pack = parts["scales"].shape[0], 32 // self._bits
        self._expect({"qweight": (self.columns // pack, self.rows), "scales": (groups, self.rows)})
        self._expect({"qzeros": (groups, -(-self.rows // pack)), "g_idx": (self.columns,)})
        if self.columns % pack or (group * groups < self.columns and "g_idx" not in parts):
            raise ValueError(f"{self.columns} inputs do not go into words of {pack} and {groups} groups")

    def _fill(self, parts: Parts, matrix: torch.Tensor) -> None:
        scales = parts["scales"]
        zeros = _unpacked(parts["qzeros"] + self._zero_lacks, self._bits)[:, : self.rows]
        group_of = parts.get("g_idx", torch.arange(self.columns, device=matrix.device) // self._group)
        pack = 32 // self._bits
        for words in _chunks(self.columns // pack, self.rows * pack):
            inputs = slice(words.start * pack, words.stop * pack)
            codes = _unpacked(parts["qweight"][words].t(), self._bits)
            groups = group_of[inputs].long()
            numbers = scales[groups].t() * (codes - zeros[groups].t()).to(scales.dtype)
            matrix[:, inputs].copy_(numbers)


class InterleavedRows(PackedMatrix):
    """AWQ (gemm): the transposed matrix, and its zeros, in words along its rows; eight numbers have their own order."""

    names = ("qweight", "qzeros", "scales")

    def __init__(self, shape: torch.Size, parts: Mapping[str, PartForm]) -> None:
        super().__init__(shape, parts)
        groups = parts["scales"].shape[0]
        self._expect({"qweight": (self.columns, self.rows // 8), "qzeros": (groups, self.rows // 8)})
        self._expect({"scales": (groups, self.rows)})
        if self.rows % 8 or self.columns % groups:
            raise ValueError(f"{list(shape)} does not go into words of 8 and {groups} groups")

    def _fill(self, parts: Parts, matrix: torch.Tensor) -> None:
        scales, order = parts["scales"], torch.tensor(_AWQ_ORDER, device=matrix.device)

        def numbers(words: torch.Tensor) -> torch.Tensor:
            eights: torch.Tensor = _unpacked(words, 4).unflatten(1, (-1, 8))
            return eights.index_select(2, order).flatten(1)

        group, zeros = self.columns // len(scales), numbers(parts["qzeros"])
        for inputs in _chunks(self.columns, self.rows):
            groups = torch.arange(inputs.start, inputs.stop, device=matrix.device) // group
            codes = numbers(parts["qweight"][inputs]) - zeros[groups]
            matrix[:, inputs].copy_((codes.to(scales.dtype) * scales[groups]).t())


def _bits(words: int, count: int) -> int:
    bits = words * 32 // count
    if bits not in (2, 4, 8):
        raise ValueError(f"{bits} bits a number; 2, 4 and 8 can be run")
    return bits


def _groups(scale: torch.Size, shape: torch.Size) -> int:
    """Groups of a row that have a scale each, by the shape of the scales."""
    rows, groups = scale if len(scale) == 2 else (scale.numel(), 1)
    if rows not in (1, shape[0]) or shape[1] % groups:
        raise ValueError(f"weight_scale {list(scale)} is neither of rows nor of groups in them, of {list(shape)}")
    return groups


def _as_columns(scales: torch.Tensor) -> torch.Tensor:
    """Scales `[rows, groups]`; a single row stands for all."""
    return scales if scales.ndim == 2 else scales.view(-1, 1)


def _rows_of(table: torch.Tensor | None, rows: slice) -> Any:
    return table if table is None or len(table) == 1 else table[rows]


def _chunks(count: int, width: int) -> Iterator[slice]:
    """Slices of `count` rows of `width` numbers."""
    size = max(1, _CHUNK_ELEMENTS // width)
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers int32 `[rows, columns * 32 / bits]` of int32 words `[rows, columns]`, low bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words[:, :, None] >> shifts) & ((1 << bits) - 1)).flatten(1)


def _scale(matrix: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> None:
    """Write `(codes - zeros) * scales` of `[rows, groups]` each, computed in the matrix's type."""
    scales = scales.to(matrix.dtype)
    numbers = codes.to(scales.dtype).unflatten(1, (scales.shape[1], -1))
    if zeros is not None:
        numbers = numbers - zeros.to(scales.dtype)[:, :, None]
    matrix.copy_((numbers * scales[:, :, None]).flatten(1))
