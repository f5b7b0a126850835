"""The transposed matrices of GPTQ and AWQ, in 32-bit words."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engine.kernels.packed.matrix import PackedMatrix, PartForm, Parts, chunks, unpacked, word_bits

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The position of each of eight numbers in its word."""


class _Words(PackedMatrix):
    names = ("qweight", "qzeros", "scales")

    def _expect_words(self) -> None:
        self._expect_plain("scales")
        for name in self.names[:2]:
            self._expect_dtype(name, torch.int32)


class PackedColumns(_Words):
    """GPTQ: the transposed matrix in words along its columns; zero points along its rows; a group for each input."""

    optional = ("g_idx",)

    def __init__(self, shape: torch.Size, parts: Mapping[str, PartForm], *, group: int, zero_lacks: int) -> None:
        """group: the inputs that share a scale, where there is no g_idx. zero_lacks: the offset of stored zeros."""
        super().__init__(shape, parts)
        self._bits, self._group = word_bits(parts["qweight"].shape[0], self.columns), group
        # Added to words, not to numbers: it was taken off there, with what that borrows of the neighbour.
        self._zero_lacks = sum(zero_lacks << at for at in range(0, 32, self._bits))
        self._expect_words()
        groups, pack = parts["scales"].shape[0], 32 // self._bits
        self._expect({"qweight": (self.columns // pack, self.rows), "scales": (groups, self.rows)})
        self._expect({"qzeros": (groups, -(-self.rows // pack)), "g_idx": (self.columns,)})
        if self.columns % pack or (group * groups < self.columns and "g_idx" not in parts):
            raise ValueError(f"{self.columns} inputs do not go into words of {pack} and {groups} groups")

    def _fill(self, parts: Parts, matrix: torch.Tensor) -> None:
        scales = parts["scales"]
        zeros = unpacked(parts["qzeros"] + self._zero_lacks, self._bits)[:, : self.rows]
        group_of = parts.get("g_idx", torch.arange(self.columns, device=matrix.device) // self._group)
        pack = 32 // self._bits
        for words in chunks(self.columns // pack, self.rows * pack):
            inputs = slice(words.start * pack, words.stop * pack)
            codes = unpacked(parts["qweight"][words].t(), self._bits)
            groups = group_of[inputs].long()
            numbers = scales[groups].t() * (codes - zeros[groups].t()).to(scales.dtype)
            matrix[:, inputs].copy_(numbers)


class InterleavedRows(_Words):
    """AWQ (gemm): the transposed matrix, and its zero points, in words along its rows, in AWQ's order within a word."""

    def __init__(self, shape: torch.Size, parts: Mapping[str, PartForm]) -> None:
        super().__init__(shape, parts)
        self._expect_words()
        groups = parts["scales"].shape[0]
        self._expect({"qweight": (self.columns, self.rows // 8), "qzeros": (groups, self.rows // 8)})
        self._expect({"scales": (groups, self.rows)})
        if self.rows % 8 or self.columns % groups:
            raise ValueError(f"{list(shape)} does not go into words of 8 and {groups} groups")

    def _fill(self, parts: Parts, matrix: torch.Tensor) -> None:
        scales, order = parts["scales"], torch.tensor(_AWQ_ORDER, device=matrix.device)

        def numbers(words: torch.Tensor) -> torch.Tensor:
            eights: torch.Tensor = unpacked(words, 4).unflatten(1, (-1, 8))
            return eights.index_select(2, order).flatten(1)

        group, zeros = self.columns // len(scales), numbers(parts["qzeros"])
        for inputs in chunks(self.columns, self.rows):
            groups = torch.arange(inputs.start, inputs.stop, device=matrix.device) // group
            codes = numbers(parts["qweight"][inputs]) - zeros[groups]
            matrix[:, inputs].copy_((codes.to(scales.dtype) * scales[groups]).t())
