"""Matrices of small integers or float8 with scales: one in all, or one per row, group of a row, or block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from engine.kernels.packed.coded import Coded, Codes
from engine.kernels.packed.matrix import PLAIN, PartForm, Parts, RowsApart, scaled, unpacked, word_bits

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class PackedIntegers(RowsApart):
    """compressed-tensors' pack-quantized: integers of 2, 4 or 8 bits along a row; scales of groups or rows."""

    names = ("weight_packed", "weight_scale")
    optional = ("weight_zero_point",)
    unread = ("weight_shape",)

    def __init__(self, shape: torch.Size, parts: Mapping[str, PartForm], *, in_scale_type: bool = False) -> None:
        """in_scale_type: compute in the dtype of the scales, as the library does for experts; else in the model's."""
        super().__init__(shape, parts)
        self._expect_dtype("weight_packed", torch.int32)
        self._expect_dtype("weight_zero_point", torch.int32)
        self._expect_plain("weight_scale")
        self._in_scale_type = in_scale_type
        self._bits = word_bits(parts["weight_packed"].shape[-1], self.columns)
        groups = num_groups(parts["weight_scale"].shape, shape)
        words = -(-self.rows * self._bits // 32)
        self._expect({"weight_packed": (self.rows, -(-self.columns * self._bits // 32))})
        self._expect({"weight_zero_point": (words, groups)})

    def coded(self, parts: Parts, dtype: torch.dtype) -> Coded | None:
        """The kernel's input for 4-bit integers in whole words, without zero points, with a scale for each group."""
        codes, scales = parts["weight_packed"], parts["weight_scale"]
        groups = scales.shape[-1]
        is_known = self._bits == 4 and "weight_zero_point" not in parts and scales.shape[1:] == (self.rows, groups)
        if not is_known or self.columns % (8 * groups):
            return None
        kind = scales.dtype if self._in_scale_type else dtype
        # The first numbers of a word are in its first bytes.
        return Coded(Codes.INT4, codes.view(torch.uint8), scales, (1, self.columns // groups), kind)

    def _tables(self, parts: Parts) -> dict[str, torch.Tensor]:
        tables = {"codes": parts["weight_packed"], "scales": as_rows(parts["weight_scale"])}
        if "weight_zero_point" in parts:
            packed = parts["weight_zero_point"].transpose(1, 2)
            middle = 1 << (self._bits - 1)
            tables["zeros"] = unpacked(packed, self._bits)[..., : self.rows].transpose(1, 2).sub(middle)
        return tables

    def _numbers(self, tables: Parts, dtype: torch.dtype) -> torch.Tensor:
        codes = unpacked(tables["codes"], self._bits)[..., : self.columns].sub_(1 << (self._bits - 1))
        kind = tables["scales"].dtype if self._in_scale_type else dtype
        return scaled(codes, tables["scales"], tables.get("zeros"), kind)


class ScaledNumbers(RowsApart):
    """compressed-tensors' int-quantized, float-quantized and naive-quantized, and other float8: numbers and scales."""

    names = ("weight", "weight_scale")
    optional: ClassVar[tuple[str, ...]] = ("weight_zero_point",)

    def __init__(self, shape: torch.Size, parts: Mapping[str, PartForm], *, wide: bool = False) -> None:
        """wide: compute products in float32 and round them then; else compute in the model's dtype."""
        super().__init__(shape, parts)
        self._wide = wide
        self._scale = self.names[1]
        self._expect_dtype("weight", torch.int8, *FLOAT8)
        self._expect_plain(self._scale)
        num_groups(parts[self._scale].shape, shape)
        self._expect({"weight": (self.rows, self.columns), "weight_zero_point": tuple(parts[self._scale].shape)})

    def _tables(self, parts: Parts) -> dict[str, torch.Tensor]:
        tables = {"codes": parts["weight"], "scales": as_rows(parts[self._scale])}
        if "weight_zero_point" in parts:
            tables["zeros"] = as_rows(parts["weight_zero_point"])
        return tables

    def _numbers(self, tables: Parts, dtype: torch.dtype) -> torch.Tensor:
        kind = torch.float32 if self._wide else dtype
        return scaled(tables["codes"], tables["scales"], tables.get("zeros"), kind)


class InverseScaledNumbers(ScaledNumbers):
    """Float8 of quant_method fp8 without blocks: one scale of the matrix, stored as "inverse" scale."""

    names = ("weight", "weight_scale_inv")
    optional = ()
    unread = ("activation_scale",)

    def __init__(self, shape: torch.Size, parts: Mapping[str, PartForm], *, wide: bool = False) -> None:
        if parts["weight_scale_inv"].shape.numel() != 1:
            told = f"weight_scale_inv is {list(parts['weight_scale_inv'].shape)}, not one number"
            raise ValueError(f"{told}, and there is no weight_block_size")
        super().__init__(shape, parts, wide=wide)


class RowScaledNumbers(ScaledNumbers):
    """Float8 of quant_method fbgemm_fp8: one scale per row."""

    optional = ()
    unread = ("input_scale_ub",)

    def __init__(self, shape: torch.Size, parts: Mapping[str, PartForm], *, wide: bool = False) -> None:
        super().__init__(shape, parts, wide=wide)
        self._expect({"weight_scale": (self.rows, 1)})


class ModelOptFp8(ScaledNumbers):
    """ModelOpt's float8: one scale of the matrix."""

    optional = ()
    unread = ("input_scale", "k_scale", "v_scale")

    def __init__(self, shape: torch.Size, parts: Mapping[str, PartForm]) -> None:
        super().__init__(shape, parts)
        self._expect_dtype("weight", torch.float8_e4m3fn)
        if parts["weight_scale"].shape.numel() != 1:
            raise ValueError(f"weight_scale is {list(parts['weight_scale'].shape)}, not one number")


class ExponentScaledNumbers(RowsApart):
    """MXFP8: float8, and for each 32 numbers of a row a power of two, stored as its exponent with bias 127."""

    names = ("weight", "weight_scale")

    def __init__(self, shape: torch.Size, parts: Mapping[str, PartForm]) -> None:
        super().__init__(shape, parts)
        self._expect_dtype("weight", torch.float8_e4m3fn)
        self._expect_dtype("weight_scale", torch.uint8)
        self._expect({"weight": (self.rows, self.columns), "weight_scale": (self.rows, self.columns // 32)})
        if self.columns % 32:
            raise ValueError(f"{self.columns} columns are no multiple of groups of 32")

    def _tables(self, parts: Parts) -> dict[str, torch.Tensor]:
        return {"codes": parts["weight"], "exponents": parts["weight_scale"]}

    def _numbers(self, tables: Parts, dtype: torch.dtype) -> torch.Tensor:
        return scaled(tables["codes"], powers_of_two(tables["exponents"]), None, torch.float32)


class ScaledBlocks(RowsApart):
    """Float8 in blocks, as in DeepSeek's checkpoints: a scale for each rectangle, which is smaller at the far edges."""

    names = ("weight", "weight_scale_inv")

    def __init__(
        self, shape: torch.Size, parts: Mapping[str, PartForm], *, block: tuple[int, int], wide: bool = True
    ) -> None:
        """block: the rows and columns that share a scale. wide: compute in float32; else in the model's dtype."""
        super().__init__(shape, parts)
        self._block, self._wide = block, wide
        self._scale = self.names[1]
        self._expect_dtype("weight", *FLOAT8)
        exponents = () if self._scale == "weight_scale" else (torch.float8_e8m0fnu, torch.uint8)
        self._expect_dtype(self._scale, *PLAIN, *exponents)
        self._expect({"weight": (self.rows, self.columns)})
        self._expect({self._scale: (-(-self.rows // block[0]), -(-self.columns // block[1]))})

    def coded(self, parts: Parts, dtype: torch.dtype) -> Coded | None:
        """The kernel's input for e4m3 numbers with a scale, or an exponent of one, for each block."""
        codes, scales = parts["weight"], parts[self._scale]
        if codes.dtype is not torch.float8_e4m3fn:
            return None
        if scales.dtype is torch.float8_e8m0fnu:
            scales = scales.view(torch.uint8)
        return Coded(Codes.E4M3, codes.view(torch.uint8), scales, self._block, torch.float32 if self._wide else dtype)

    def _tables(self, parts: Parts) -> dict[str, torch.Tensor]:
        scales = parts[self._scale]
        if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
            scales = powers_of_two(scales.view(torch.uint8))
        scales = scales.repeat_interleave(self._block[0], 1)[:, : self.rows]
        return {"codes": parts["weight"], "scales": scales}

    def _numbers(self, tables: Parts, dtype: torch.dtype) -> torch.Tensor:
        kind = torch.float32 if self._wide else dtype
        scales = tables["scales"].to(kind).repeat_interleave(self._block[1], -1)[..., : self.columns]
        return tables["codes"].to(kind) * scales


class CompressedBlocks(ScaledBlocks):
    """compressed-tensors' float8 in blocks."""

    names = ("weight", "weight_scale")


def num_groups(scale: torch.Size, shape: torch.Size) -> int:
    """The number of groups of a row with a scale each, by the shape of the scales; `ValueError` for other shapes."""
    rows, groups = scale if len(scale) == 2 else (scale.numel(), 1)
    if rows not in (1, shape[0]) or shape[1] % groups:
        raise ValueError(f"weight_scale {list(scale)} is neither of rows nor of groups in them, of {list(shape)}")
    return groups


def as_rows(scales: torch.Tensor) -> torch.Tensor:
    """Scales as `[matrices, rows, groups]`, from one scale, one per row, or groups; a single row applies to all."""
    return scales if scales.ndim == 3 else scales.reshape(len(scales), -1, 1)


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """Powers of two as float32, from uint8 exponents with a bias of 127; 255 is NaN."""
    numbers = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - 127)
    return numbers.masked_fill(exponents == 255, torch.nan)
