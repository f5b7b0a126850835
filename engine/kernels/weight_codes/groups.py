"""Weights in codes of 4 or 8 bits, rounded: 64 consecutive numbers of a matrix share a step and a least value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from engine.kernels.codec import GROUP, Codec

_CHUNK_ELEMENTS = 2 << 20
"""Encoded at once: it takes about 30 bytes for each, on the device."""


@dataclass(frozen=True)
class GroupCodes:
    """A `WeightCodec`: what `Codec` makes of a flat parameter, its codes, steps and leasts one after the other."""

    codec: Codec
    rounds: ClassVar[bool] = True
    working_part: ClassVar[float] = 0.5
    """Half bytes of a matrix are spread over whole ones before they become numbers."""

    def takes(self, name: str, like: torch.Tensor) -> bool:
        """Groups must not reach over the end of a matrix: experts arrive one at a time."""
        return like.shape[-2:].numel() % GROUP == 0

    def num_weight_bytes(self, like: torch.Tensor) -> int:
        """Codes, steps and leasts."""
        return self.codec.num_bytes(like.numel(), like.dtype)

    def weight_ranges(self, like: torch.Tensor, first_element: int, num_elements: int) -> list[tuple[int, int]]:
        """Of codes, steps and leasts."""
        return self.codec.ranges(first_element, num_elements, like.numel(), like.dtype)

    def encoded(
        self, name: str, like: torch.Tensor, first_element: int, values: torch.Tensor, device: torch.device
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """A chunk after the other."""
        for at in range(0, values.numel(), _CHUNK_ELEMENTS):
            chunk = values[at : at + _CHUNK_ELEMENTS].to(device)
            places = self.weight_ranges(like, first_element + at, chunk.numel())
            for (place, _), part in zip(places, self.codec.encode(chunk, like.dtype), strict=True):
                yield place, part.cpu().view(torch.uint8)

    def decode_parts(self, parts: Sequence[torch.Tensor], values: torch.Tensor) -> None:
        """By a kernel, where there is one."""
        self.codec.decode_parts(parts, values)
