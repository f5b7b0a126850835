"""What encodes the large matrices of layers, and expands them before they are multiplied with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Protocol

import torch


class WeightCodec(Protocol):
    """A parameter's stored bytes, and how they are made and expanded.

    `like` is the parameter as it is computed with: its dtype and shape count, and no numbers of it are looked at. Of
    experts that are merged into one parameter, each is encoded by itself, so that it can be expanded by itself.
    """

    rounds: ClassVar[bool]
    """Whether numbers come back as others; if not, a head that is not tied to the token embedding is encoded, too."""
    working_part: ClassVar[float]
    """Of a layer's numbers, how many bytes more are in use on the device while they are expanded."""

    def takes(self, name: str, like: torch.Tensor) -> bool:
        """Whether a parameter can be encoded, and is to be."""

    def num_weight_bytes(self, like: torch.Tensor) -> int:
        """Stored bytes of a parameter."""

    def weight_ranges(self, like: torch.Tensor, first_element: int, num_elements: int) -> list[tuple[int, int]]:
        """Where in them the parts of consecutive numbers lie, which are those of whole experts, or all."""

    def encoded(
        self, name: str, like: torch.Tensor, first_element: int, values: torch.Tensor, device: torch.device
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Stored bytes of flat `values`, which are the parameter's from `first_element` on: (place, uint8 on the host).

        `device` may compute them, a few numbers at a time. Raises `UnsupportedError` for numbers that have no room.
        """

    def decode_parts(self, parts: Sequence[torch.Tensor], values: torch.Tensor) -> None:
        """Write the numbers of stored bytes that lie as `weight_ranges` says into flat `values`."""
