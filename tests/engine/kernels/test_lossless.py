"""Protects: weights that are kept lossless come back bit for bit, in at most 12.1 bits, or stay as they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreted

from engine.errors import UnsupportedError
from engine.kernels.weight_codes.lossless import Lossless
from engine.kernels.weight_codes.lossless_encoder import is_worth_it

CPU = torch.device("cpu")
CODEC = Lossless()


def stored(values: torch.Tensor) -> torch.Tensor:
    """Stored bytes of a parameter; what nobody writes is 255."""
    memory = torch.full((CODEC.num_weight_bytes(values),), 255, dtype=torch.uint8)
    for first, part in CODEC.encoded("w", values, 0, values.flatten(), CPU):
        memory[first : first + len(part)] = part
    return memory


def expanded(memory: torch.Tensor, like: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Bits of some numbers of a parameter."""
    values = torch.empty(count, dtype=like.dtype)
    CODEC.decode_parts([memory[begin:end] for begin, end in CODEC.weight_ranges(like, first, count)], values)
    return values.view(torch.int16)


def weights(*shape: int) -> torch.Tensor:
    """Numbers as trained matrices have them."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()


def every_pattern(size: int) -> torch.Tensor:
    """All 65,536 patterns of 16 bits, NaN, infinities, denormals and -0 among them, between common numbers."""
    numbers = weights(size).view(torch.int16)
    numbers[torch.arange(65536) * (size // 65536) + 1] = torch.arange(-32768, 32768).to(torch.int16)
    return numbers.view(torch.bfloat16)


def test_every_pattern_of_16_bits_comes_back() -> None:
    values = every_pattern(400 * 65536).view(5120, 5120)
    memory = stored(values)
    assert expanded(memory, values, 0, values.numel()).equal(values.flatten().view(torch.int16))
    assert len(memory) * 8 / values.numel() <= 12.1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3), st.integers(0, 70), st.integers(0, 97), st.integers(0, 2**31))
def test_matrices_of_any_shape_come_back_together_and_one_by_one(
    count: int, rows: int, columns: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    exponents = torch.randint(1, 1 << 7, (14,), generator=random)[
        torch.randint(14, (count, rows, columns), generator=random)
    ]
    signs, fractions = (torch.randint(0, top, (count, rows, columns), generator=random) for top in (2, 128))
    bits = ((signs << 15) | (exponents << 7) | fractions).to(torch.int16)
    size = rows * columns
    if size >= 320:  # room for an escape
        bits.view(count, size)[:, size // 2] = -1
    values = bits.view(torch.bfloat16)
    memory = stored(values)
    assert expanded(memory, values, 0, values.numel()).equal(bits.flatten())
    for index in range(count if size else 0):
        assert expanded(memory, values, index * size, size).equal(bits[index].flatten())


def with_escapes(count: int) -> torch.Tensor:
    """64,000 numbers of 15 exponents, and so many among the last of them of another one."""
    bits = ((torch.arange(64_000) % 15 + 100) << 7).to(torch.int16)
    bits[64_000 - 3 * count :: 3] = 50 << 7
    return bits.view(torch.bfloat16).view(200, 320)


def test_a_matrix_has_as_many_escapes_as_there_is_room_for() -> None:
    full = with_escapes(200)
    assert expanded(stored(full), full, 0, 64_000).equal(full.flatten().view(torch.int16))
    with pytest.raises(
        UnsupportedError, match=r"w has 201 of 64,000 numbers .* and room for 200; leave compress-weight"
    ):
        stored(with_escapes(201))


def test_only_matrices_that_become_smaller_are_taken() -> None:
    assert CODEC.takes("w", weights(64, 64))
    assert not CODEC.takes("w", weights(64, 64).half())
    assert not CODEC.takes("w", weights(8, 8))
    assert not Lossless(frozenset({"w"})).takes("w", weights(64, 64))
    assert is_worth_it(weights(64_000))
    assert not is_worth_it(with_escapes(200).flatten())


_SCRIPT = """
import torch
from engine.kernels.weight_codes.lossless import HALF, Lossless
from engine.kernels.weight_codes.lossless_kernel import expand

for shape in ((3, 5, 1237), (1, 2048), (2, 64, 160)):
    values = (torch.randn(shape) * 0.02).bfloat16()
    for at, number in enumerate((float("nan"), -0.0, float("inf"), 1e-40, 3e38)):
        values.view(-1)[7 + 900 * at :: 4500] = number
    codec, size = Lossless(), values.shape[-2:].numel()
    memory = torch.zeros(codec.num_weight_bytes(values), dtype=torch.uint8)
    for first, part in codec.encoded("w", values, 0, values.flatten(), torch.device("cpu")):
        memory[first : first + len(part)] = part
    parts = [memory[first:end] for first, end in codec.weight_ranges(values, 0, values.numel())]
    parts[3:5] = parts[3].view(torch.int32), parts[4].view(torch.int16)
    count = values.numel() // size
    found = torch.zeros(count, size, dtype=torch.int16)
    expand(found, [part.view(count, -1) for part in parts], HALF)
    assert parts[3].max() > 0
    assert found.flatten().equal(values.flatten().view(torch.int16))
    print("same")
"""


def test_the_kernel_expands_as_torch_does_in_tritons_interpreter() -> None:
    assert interpreted(_SCRIPT) == ["same"] * 3
