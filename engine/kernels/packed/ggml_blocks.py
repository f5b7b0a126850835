"""The matrices of GGUF files: blocks of a row's numbers, each with its scales next to its codes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch

from engine.kernels.packed.matrix import PartForm, Parts, RowsApart


class GgmlBlocks(RowsApart):
    """Blocks `[..., blocks of a row, bytes]`; the leading dimensions are flattened to rows.

    Numbers are computed in float32, like in the gguf package.
    """

    numbers: ClassVar[int]
    """The number of elements of a block."""
    num_bytes: ClassVar[int]
    """The number of bytes of a block."""

    def __init__(self, shape: torch.Size, parts: Mapping[str, PartForm]) -> None:
        super().__init__(shape, parts)
        (name,) = self.names
        self._expect_dtype(name, torch.uint8)
        if self.columns % self.numbers:
            raise ValueError(f"{self.columns} columns are no multiple of blocks of {self.numbers}")
        found, blocks = parts[name].shape, self.columns // self.numbers
        if found.numel() != self.rows * blocks * self.num_bytes or tuple(found[-2:]) != (blocks, self.num_bytes):
            raise ValueError(f"{name} is {list(found)} instead of {[self.rows, blocks, self.num_bytes]}")

    def _tables(self, parts: Parts) -> dict[str, torch.Tensor]:
        blocks = parts[self.names[0]]
        return {"blocks": blocks.reshape(len(blocks), self.rows, -1, self.num_bytes)}

    def _numbers(self, tables: Parts, dtype: torch.dtype) -> torch.Tensor:
        return self._values(tables["blocks"]).flatten(-2)

    @abstractmethod
    def _values(self, blocks: torch.Tensor) -> torch.Tensor:
        """Decode uint8 `[..., bytes]` -> float32 `[..., numbers]`."""


class Q8(GgmlBlocks):
    """Q8_0: a float16 scale and 32 int8."""

    names = ("q8_0",)
    numbers, num_bytes = 32, 34

    def _values(self, blocks: torch.Tensor) -> torch.Tensor:
        return blocks[..., 2:].view(torch.int8).float().mul_(_half(blocks, 0))


class Q4(GgmlBlocks):
    """Q4_0: a float16 scale and 32 numbers of 4 bits, less 8; the first 16 are in the low halves of 16 bytes."""

    names = ("q4_0",)
    numbers, num_bytes = 32, 18

    def _values(self, blocks: torch.Tensor) -> torch.Tensor:
        return _halves(blocks[..., 2:]).float().sub_(8).mul_(_half(blocks, 0))


class Q4WithLeast(GgmlBlocks):
    """Q4_1: a float16 scale, the float16 of code 0, and 32 numbers of 4 bits in the order of Q4_0."""

    names = ("q4_1",)
    numbers, num_bytes = 32, 20

    def _values(self, blocks: torch.Tensor) -> torch.Tensor:
        return _halves(blocks[..., 4:]).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


class Q6Nested(GgmlBlocks):
    """Q6_K: 256 numbers of 6 bits, less 32: low 4 bits, high 2 bits, int8 scales of groups of 16, a float16 for all.

    Published Q4_0 files store their head or the token embedding in this format.
    """

    names = ("q6_k",)
    numbers, num_bytes = 256, 210

    def _values(self, blocks: torch.Tensor) -> torch.Tensor:
        low, high, scales = blocks[..., :128], blocks[..., 128:192], blocks[..., 192:208].view(torch.int8)
        # Of each half of the block: 64 bytes of low bits for 128 numbers, and 32 bytes of high ones.
        lows = _halves(low.unflatten(-1, (2, 64)))
        shifts = torch.tensor([[0], [2], [4], [6]], dtype=torch.uint8, device=blocks.device)
        highs = (high.unflatten(-1, (2, 1, 32)) >> shifts & 3).flatten(-2)
        codes = (lows | highs << 4).float().sub_(32).flatten(-2)
        factors = scales.float().mul_(_half(blocks, 208))
        numbers: torch.Tensor = codes.unflatten(-1, (16, 16)).mul_(factors[..., None])
        return numbers.flatten(-2)


FORMS: dict[str, type[GgmlBlocks]] = {form.names[0].upper(): form for form in (Q8, Q4, Q4WithLeast, Q6Nested)}
"""The block formats by ggml's type names."""


def _half(blocks: torch.Tensor, first: int) -> torch.Tensor:
    """The float16 that begins at a byte of each block, as float32 `[..., 1]`."""
    return blocks[..., first : first + 2].view(torch.float16).float()


def _halves(codes: torch.Tensor) -> torch.Tensor:
    """The low halves of all bytes, then the high ones: uint8 `[..., bytes]` -> uint8 `[..., 2 * bytes]`."""
    return torch.cat((codes & 15, codes >> 4), dim=-1)
