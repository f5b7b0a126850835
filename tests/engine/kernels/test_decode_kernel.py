"""Protects: the Triton kernels encode and decode as torch's operations do, wherever rows of codes lie."""

from __future__ import annotations

from interpreter import interpreted

_SCRIPT = """
import itertools
import torch
from engine.kernels.codec import BEND, GROUP, Codec, _decode_into
from engine.kernels.decode_kernel import decode_into
from engine.kernels.encode_kernel import encode

# Numbers in bfloat16 aside, which the interpreter cuts off instead of rounding.
exact = {"rtol": 0, "atol": 0, "equal_nan": True}
for bits, dtype, (rows, groups) in itertools.product(
    (4, 8), (torch.float16, torch.float32), ((3, 65), (1, 1))
):
    codec = Codec(bits)
    numbers = torch.randn(rows, groups * GROUP).to(dtype)
    numbers[-1, :GROUP] = 2.0
    numbers[0, -1] = torch.nan
    width, code_bytes, scale_bytes = groups * GROUP, codec.code_bytes(groups * GROUP), 2 * groups
    coded = codec.encode_rows(numbers)
    back = codec.decode_rows(coded, width, dtype)
    whole = torch.zeros(rows, coded.shape[1] + 16, dtype=torch.uint8)  # rows that lie apart
    whole[:, : coded.shape[1]] = coded
    parts = whole.split((code_bytes, scale_bytes, scale_bytes, 16), dim=1)[:3]
    parts = [part.unflatten(1, (groups, -1)) for part in parts]
    found = torch.empty(rows, groups, GROUP, dtype=dtype)
    decode_into(found, *parts, bits, BEND)
    torch.testing.assert_close(found.flatten(1), back, **exact)
    flat = [part.flatten(0, 1).contiguous() for part in parts]
    again, expected = torch.empty(rows * groups, GROUP, dtype=dtype), torch.empty(rows * groups, GROUP, dtype=dtype)
    decode_into(again, *flat, bits, BEND)
    torch.testing.assert_close(again, _decode_into(expected, *flat, bits), **exact)

    mine = torch.cat([part.flatten(1) for part in encode(numbers.unflatten(1, (-1, GROUP)), bits, BEND)], dim=1)
    of_mine = codec.decode_rows(mine, width, dtype)
    finite = back.isfinite()
    assert of_mine.isfinite().equal(finite)
    other = ((of_mine != back) & finite).view(-1, GROUP).any(dim=1)
    assert other.sum() <= 1  # two multiples may nearly tie
    print("same")
"""


def test_the_kernels_do_as_torch_does_in_tritons_interpreter() -> None:
    assert interpreted(_SCRIPT) == ["same"] * 8
