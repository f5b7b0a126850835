"""Matrices of four-bit floats (E2M1, two in a byte, the first in the low half), with a scale per group of a row."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch

from engine.kernels.packed.coded import Coded, Codes
from engine.kernels.packed.matrix import PartForm, Parts, RowsApart, scaled
from engine.kernels.packed.numbers import powers_of_two

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of codes 0 to 7; codes from 8 on are the same values, negative."""


class FourBitFloats(RowsApart):
    """Codes `[rows, columns / 2]` and scales `[rows, columns / group]`, each in a type of the format's."""

    group: ClassVar[int]
    """The numbers of a row that share a scale."""
    scale_type: ClassVar[torch.dtype]
    rounds_to: ClassVar[torch.dtype] = torch.float32
    """The dtype to which the format's library rounds numbers before they are converted to the model's."""

    def __init__(self, shape: torch.Size, parts: Mapping[str, PartForm]) -> None:
        super().__init__(shape, parts)
        codes, scale = self.names[:2]
        self._expect_dtype(codes, torch.uint8)
        self._expect_dtype(scale, self.scale_type)
        if self.columns % self.group:
            raise ValueError(f"{self.columns} columns are no multiple of groups of {self.group}")
        self._expect_codes()
        self._expect({scale: (self.rows, self.columns // self.group)})
        for name in self.names[2:]:
            self._expect_dtype(name, torch.float32)
            if parts[name].shape.numel() != 1:
                raise ValueError(f"{name} is {list(parts[name].shape)}, not one number")

    def _expect_codes(self) -> None:
        self._expect({self.names[0]: (self.rows, self.columns // 2)})

    def _tables(self, parts: Parts) -> dict[str, torch.Tensor]:
        codes, scale, *others = self.names
        tables = {"codes": parts[codes].flatten(2), "scales": parts[scale]}
        return tables | {name: parts[name].reshape(-1, 1, 1) for name in others}

    def _numbers(self, tables: Parts, dtype: torch.dtype) -> torch.Tensor:
        values = torch.tensor([*_VALUES, *(-each for each in _VALUES)], device=tables["codes"].device)
        codes = tables["codes"].int()
        numbers = values[torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)]
        return scaled(numbers, self._scales(tables), None, torch.float32).to(self.rounds_to)

    @abstractmethod
    def _scales(self, tables: Parts) -> torch.Tensor:
        """The scales as float32 `[..., groups]`."""


class NvFp4(FourBitFloats):
    """compressed-tensors' nvfp4-pack-quantized: float8 scales of groups, all divided by a scale of the matrix."""

    names = ("weight_packed", "weight_scale", "weight_global_scale")
    unread = ("input_global_scale",)
    group, scale_type, rounds_to = 16, torch.float8_e4m3fn, torch.bfloat16

    def _scales(self, tables: Parts) -> torch.Tensor:
        return tables["scales"].float() / tables["weight_global_scale"]


class ModelOptNvFp4(FourBitFloats):
    """ModelOpt's NVFP4: float8 scales of groups, all multiplied by a scale of the matrix."""

    names = ("weight", "weight_scale", "weight_scale_2")
    unread = ("input_scale", "k_scale", "v_scale")
    group, scale_type = 16, torch.float8_e4m3fn

    def _scales(self, tables: Parts) -> torch.Tensor:
        return tables["scales"].float() * tables["weight_scale_2"]


class MxFp4(FourBitFloats):
    """compressed-tensors' mxfp4-pack-quantized: for each group a power of two, stored as its exponent with bias 127."""

    names = ("weight_packed", "weight_scale")
    group, scale_type = 32, torch.uint8

    def coded(self, parts: Parts, dtype: torch.dtype) -> Coded | None:
        """The codes and exponents, unchanged."""
        codes, scale = (parts[name] for name in self.names)
        return Coded(Codes.E2M1, codes.flatten(2), scale, (1, self.group), torch.float32)

    def _scales(self, tables: Parts) -> torch.Tensor:
        return powers_of_two(tables["scales"])


class MxFp4Blocks(MxFp4):
    """MXFP4 as gpt-oss is published: codes `[rows, groups, 16]` of experts, and their exponents."""

    names = ("blocks", "scales")

    def _expect_codes(self) -> None:
        self._expect({"blocks": (self.rows, self.columns // self.group, self.group // 2)})
