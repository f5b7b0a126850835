"""The interface of codecs for the large matrices of layers, which are decoded before they are multiplied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Protocol

import torch


class WeightCodec(Protocol):
    """Encodes and decodes a parameter's stored bytes.

    `like` is the parameter in its computed form: only its dtype and shape are used. Of experts that are merged into one
    parameter, each is encoded by itself, so that it can be decoded by itself.
    """

    rounds: ClassVar[bool]
    """Whether the codec is lossy; if not, a head that is not tied to the token embedding is encoded, too."""
    working_part: ClassVar[float]
    """The additional bytes on the device while a layer is decoded, per number of the layer."""

    def takes(self, name: str, like: torch.Tensor) -> bool:
        """Whether the codec encodes a parameter."""

    def num_weight_bytes(self, like: torch.Tensor) -> int:
        """The number of stored bytes of a parameter."""

    def weight_ranges(self, like: torch.Tensor, first_element: int, num_elements: int) -> list[tuple[int, int]]:
        """The ranges, in the stored bytes, of the parts of consecutive numbers: whole experts, or all numbers."""

    def encoded(
        self, name: str, like: torch.Tensor, first_element: int, values: torch.Tensor, device: torch.device
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield stored bytes of flat `values`, the parameter's numbers from `first_element` on: (position, uint8).

        The bytes are on the host; `device` may be used to encode, a few numbers at a time. Raises `UnsupportedError`
        for numbers without space.
        """

    def decode_parts(self, parts: Sequence[torch.Tensor], values: torch.Tensor) -> None:
        """Decode the stored bytes, given as `weight_ranges` returns them, into flat `values`."""
