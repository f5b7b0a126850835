"""What the parts of a code are as stored bytes."""

from __future__ import annotations

import torch

from engine.kernels.codec import Codec


def join(codec: Codec, parts: tuple[torch.Tensor, ...], count: int) -> torch.Tensor:
    """The stored bytes of what `encode` gave."""
    code_bytes, scale_bytes = codec.part_bytes(count)
    coded = torch.full((codec.num_bytes(count),), 255, dtype=torch.uint8)
    for first, part in zip((0, code_bytes, code_bytes + scale_bytes), parts, strict=True):
        raw = part.view(torch.uint8)
        coded[first : first + len(raw)] = raw
    return coded
