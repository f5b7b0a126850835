"""The formats that one kernel decodes: codes in bytes along a row, and a scale for each block."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch


class Codes(IntEnum):
    """The encoding of a number."""

    E2M1 = 0
    """Four-bit float, two in a byte, the first in the low half."""
    INT4 = 1
    """Four-bit integer plus 8, in the same order."""
    E4M3 = 2
    """Eight-bit float, without infinities."""


@dataclass(frozen=True)
class Coded:
    """Several matrices of codes; a number is its code's value times its block's scale."""

    kind: Codes
    codes: torch.Tensor
    """The codes, uint8 `[matrices, rows, bytes]`; the bytes of a row are adjacent."""
    scales: torch.Tensor
    """The scales, `[matrices, blocks by rows, blocks by columns]`: numbers, or exponents of two with bias 127 as
    uint8."""
    block: tuple[int, int]
    """The rows and columns that share a scale; the number of columns is even."""
    rounds_to: torch.dtype
    """The dtype to which scales and products are rounded before they are converted to the target's."""
