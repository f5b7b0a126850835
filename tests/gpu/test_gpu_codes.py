"""On a CUDA device codes are decoded by a kernel, to the numbers that torch's operations give on the host."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import codec
from engine.kernels.codec import GROUP, Codec

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_card_decodes_what_the_host_does_bit_for_bit(bits: int, dtype: torch.dtype) -> None:
    numbers = (torch.randn(1000, 7, GROUP) * torch.rand(1000, 7, 1) * 10).to(dtype)
    numbers[3, 2], numbers[5, 1, 7] = 0.5, torch.nan
    rows = numbers.flatten(1)
    form = Codec(bits)
    coded = form.encode_rows(rows)
    found = form.decode_rows(coded.cuda(), rows.shape[1], dtype).cpu()
    expected = form.decode_rows(coded, rows.shape[1], dtype)
    assert (
        found.view(torch.int16).where(~found.isnan(), 0).equal(expected.view(torch.int16).where(~expected.isnan(), 0))
    )
    assert found.isnan().equal(expected.isnan())

    count = numbers.numel()
    parts = form.encode(rows.flatten(), dtype)
    whole = torch.zeros(form.num_bytes(count, dtype), dtype=torch.uint8)
    code_bytes, step_bytes = form.part_bytes(count, dtype)
    for part, first in zip(parts, (0, code_bytes, code_bytes + step_bytes), strict=True):
        whole[first : first + part.nbytes] = part.view(torch.uint8)
    flat = torch.empty(count, dtype=dtype, device="cuda")
    form.decode(whole.cuda(), flat)
    assert flat.cpu().nan_to_num(9).equal(expected.flatten().nan_to_num(9))
    assert not codec._fill._fails
