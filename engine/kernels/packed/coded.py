"""What formats have in common that one kernel expands: codes in bytes along a row, and a scale for each block."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch


class Codes(IntEnum):
    """How a number is stored."""

    E2M1 = 0
    """Four-bit float, two in a byte, the first in the low half."""
    INT4 = 1
    """Whole number and 8, in the same order."""
    E4M3 = 2
    """Eight-bit float, without infinities."""


@dataclass(frozen=True)
class Coded:
    """Several matrices of codes, each number of which is its code's value times its block's scale."""

    kind: Codes
    codes: torch.Tensor
    """uint8 `[matrices, rows, bytes]`, of which the bytes of a row lie side by side."""
    scales: torch.Tensor
    """`[matrices, blocks below one another, blocks in a row]`: numbers, or exponents of two and 127 as uint8."""
    block: tuple[int, int]
    """Rows and columns that share a scale; an even number of columns."""
    rounds_to: torch.dtype
    """What scales and products are rounded to before they become the target's."""
