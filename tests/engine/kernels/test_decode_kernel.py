"""Protects: the Triton kernel decodes to the numbers of torch's operations, wherever rows of codes lie."""

from __future__ import annotations

from interpreter import interpreted

_SCRIPT = """
import itertools
import torch
from engine.kernels.codec import GROUP, Codec, _decode_into
from engine.kernels.decode_kernel import decode_into

# Without bfloat16, which the interpreter cuts off instead of rounding. In float32, a product that is fused with its sum
# is rounded once less.
tolerances = {torch.float16: {"rtol": 0, "atol": 0}, torch.float32: {"rtol": 1e-6, "atol": 1e-6}}
for bits, dtype, (rows, groups) in itertools.product((4, 8), tolerances, ((37, 7), (3, 65), (1, 1))):
    close = {**tolerances[dtype], "equal_nan": True}
    codec = Codec(bits)
    numbers = torch.randn(rows, groups * GROUP).to(dtype)
    numbers[-1, :GROUP] = 2.0
    numbers[0, -1] = torch.nan
    width, code_bytes = groups * GROUP, codec.code_bytes(groups * GROUP)
    coded = codec.encode_rows(numbers)
    whole = torch.zeros(rows, coded.shape[1] + 16, dtype=torch.uint8)  # rows that lie apart
    whole[:, : coded.shape[1]] = coded
    seen, first = whole.view(dtype), code_bytes // dtype.itemsize
    codes = whole[:, :code_bytes].unflatten(1, (groups, -1))
    steps, leasts = seen[:, first : first + groups], seen[:, first + groups : first + 2 * groups]
    found = torch.empty(rows, groups, GROUP, dtype=dtype)
    decode_into(found, codes, steps, leasts, bits)
    torch.testing.assert_close(found.flatten(1), codec.decode_rows(coded, width, dtype), **close)
    flat = [part.flatten(0, 1).contiguous() for part in (codes, steps, leasts)]
    again, expected = torch.empty(rows * groups, GROUP, dtype=dtype), torch.empty(rows * groups, GROUP, dtype=dtype)
    decode_into(again, *flat, bits)
    torch.testing.assert_close(again, _decode_into(expected, *flat, bits), **close)
    print("same")
"""


def test_the_kernel_decodes_as_torch_does_in_tritons_interpreter() -> None:
    assert interpreted(_SCRIPT) == ["same"] * 12
