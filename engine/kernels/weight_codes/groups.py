"""Weights in rounded codes of 4 or 8 bits: 64 consecutive numbers of a matrix form a group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from engine.kernels.codec import GROUP, Codec

_CHUNK_ELEMENTS = 2 << 20
"""The most numbers that are encoded at once: encoding takes about 30 bytes for each, on the device."""


@dataclass(frozen=True)
class GroupCodes:
    """A `WeightCodec` that applies `Codec` to a flat parameter: its codes, scales and multiples one after the other."""

    codec: Codec
    rounds: ClassVar[bool] = True
    working_part: ClassVar[float] = 0.5
    """Decoding first spreads half bytes over whole ones."""

    def takes(self, name: str, like: torch.Tensor) -> bool:
        """Whether groups fit: none may reach over the end of a matrix, since experts arrive one at a time."""
        return like.shape[-2:].numel() % GROUP == 0

    def num_weight_bytes(self, like: torch.Tensor) -> int:
        """The bytes of codes, scales and multiples."""
        return self.codec.num_bytes(like.numel())

    def weight_ranges(self, like: torch.Tensor, first_element: int, num_elements: int) -> list[tuple[int, int]]:
        """The ranges of codes, scales and multiples."""
        return self.codec.ranges(first_element, num_elements, like.numel())

    def encoded(
        self, name: str, like: torch.Tensor, first_element: int, values: torch.Tensor, device: torch.device
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Encode one chunk after the other."""
        for at in range(0, values.numel(), _CHUNK_ELEMENTS):
            chunk = values[at : at + _CHUNK_ELEMENTS].to(device)
            places = self.weight_ranges(like, first_element + at, chunk.numel())
            for (place, _), part in zip(places, self.codec.encode(chunk.to(like.dtype)), strict=True):
                yield place, part.cpu()

    def decode_parts(self, parts: Sequence[torch.Tensor], values: torch.Tensor) -> None:
        """Decode by a kernel, where there is one."""
        self.codec.decode_parts(parts, values)
