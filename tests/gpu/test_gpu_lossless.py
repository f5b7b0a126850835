"""On a CUDA device lossless weights are expanded by a kernel, bit for bit."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.weight_codes import lossless
from engine.kernels.weight_codes.lossless import Lossless

pytestmark = pytest.mark.gpu
CODEC = Lossless()


def stored(values: torch.Tensor) -> torch.Tensor:
    memory = torch.full((CODEC.num_weight_bytes(values),), 255, dtype=torch.uint8)
    for first, part in CODEC.encoded("w", values, 0, values.flatten(), values.device):
        memory[first : first + len(part)] = part
    return memory


def normal(*shape: int) -> torch.Tensor:
    return (torch.randn(shape) * 0.02).bfloat16()


def every_pattern() -> torch.Tensor:
    numbers = normal(5120, 5120)
    numbers.view(torch.int16).view(-1)[1 :: 5120 * 5120 // 65536][:65536] = torch.arange(-32768, 32768).to(torch.int16)
    return numbers


@pytest.mark.parametrize(
    "values",
    [every_pattern(), normal(2048, 1024), normal(1, 14336, 64), normal(5, 37, 129), normal(3, 1000, 1001)],
    ids=lambda values: "x".join(map(str, values.shape)),
)
def test_the_card_expands_every_number_to_its_bits(values: torch.Tensor) -> None:
    memory = stored(values)
    on_card, size = memory.cuda(), values.shape[-2:].numel()
    for first in (0, values.numel() - size):  # all of them, and the last matrix
        count = values.numel() - first
        found = torch.full((count,), torch.nan, dtype=torch.bfloat16, device="cuda")
        ranges = CODEC.weight_ranges(values, first, count)
        CODEC.decode_parts([on_card[begin:end] for begin, end in ranges], found)
        assert found.cpu().view(torch.int16).equal(values.flatten().view(torch.int16)[first:])
    assert not lossless._fill._fails
