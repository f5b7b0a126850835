"""On a CUDA device codes are decoded by a kernel, to the numbers that torch's operations give on the host."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from engine.kernels import codec
from engine.kernels.codec import GROUP, Codec
from engine.kernels.packed import matrix
from engine.kernels.packed.fours import MxFp4Blocks
from engine.kernels.packed.matrix import PartForm, RowsApart
from engine.kernels.packed.numbers import PackedIntegers, ScaledBlocks

pytestmark = pytest.mark.gpu
COUNT, ROWS, COLUMNS = 5, 200, 320


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
    assert found.isfinite().equal(expected.isfinite())
    assert found.where(found.isfinite(), 0).equal(expected.where(expected.isfinite(), 0))

    count = numbers.numel()
    whole = torch.zeros(form.num_bytes(count), dtype=torch.uint8)
    for part, (first, end) in zip(form.encode(rows.flatten()), form.ranges(0, count, count), strict=True):
        whole[first:end] = part
    flat = torch.empty(count, dtype=dtype, device="cuda")
    form.decode(whole.cuda(), flat)
    assert (
        flat.cpu()
        .where(expected.flatten().isfinite(), 0)
        .equal(expected.flatten().where(expected.flatten().isfinite(), 0))
    )
    assert not codec._fill._fails


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_card_encodes_what_the_host_does(bits: int, dtype: torch.dtype) -> None:
    """But for groups in which two multiples, or two codes, nearly tie; whatever is encoded beside a row."""
    rows = (torch.randn(1000, 7, GROUP) * torch.rand(1000, 7, 1) * 10).to(dtype).flatten(1)
    rows[5, 3], rows[6, 70], rows[9] = torch.nan, torch.inf, 0.0
    form = Codec(bits)
    found = form.encode_rows(rows.cuda())
    back, expected = (form.decode_rows(each, rows.shape[1], dtype) for each in (found.cpu(), form.encode_rows(rows)))
    assert back.isfinite().equal(expected.isfinite())
    assert back.isfinite().view(1000, -1, GROUP).sum() == (1000 * 7 - 2) * GROUP
    back, expected = (each.where(each.isfinite(), 0) for each in (back, expected))
    groups_apart = (back != expected).view(-1, GROUP).any(dim=1)
    assert groups_apart.float().mean() < 1e-3
    assert (back.float() - expected.float()).norm() < 1e-3 * expected.float().norm()
    assert found[200:203].equal(form.encode_rows(rows[200:203].cuda()))
    assert found[7:8].equal(form.encode_rows(rows[7:8].cuda()))
    assert not codec._encode_fast._fails


def packed(name: str) -> tuple[RowsApart, dict[str, torch.Tensor]]:
    """Matrices of a format, all of whose codes and many of whose scales occur."""
    bytes_ = torch.randint(256, (COUNT, ROWS, COLUMNS), dtype=torch.uint8)
    if name == "mxfp4":
        scales = torch.randint(100, 141, (COUNT, ROWS, COLUMNS // 32), dtype=torch.uint8)
        parts = {"blocks": bytes_[..., : COLUMNS // 2].reshape(COUNT, ROWS, -1, 16), "scales": scales}
    elif name == "float8 in blocks":
        parts = {"weight": bytes_.view(torch.float8_e4m3fn), "weight_scale_inv": torch.rand(COUNT, 2, 3) / 9}
    else:
        words = bytes_[..., : COLUMNS // 2].contiguous().view(torch.int32)
        parts = {"weight_packed": words, "weight_scale": torch.randn(COUNT, ROWS, COLUMNS // 32).bfloat16()}
    forms = {key: PartForm(part.dtype, part.shape[1:]) for key, part in parts.items()}
    shape = torch.Size((ROWS, COLUMNS))
    if name == "mxfp4":
        return MxFp4Blocks(shape, forms), parts
    if name == "float8 in blocks":
        return ScaledBlocks(shape, forms, block=(128, 128)), parts
    return PackedIntegers(shape, forms, in_scale_type=name == "int4 in the type of its scales"), parts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["mxfp4", "float8 in blocks", "int4", "int4 in the type of its scales"])
def test_the_card_expands_what_torch_does_on_the_host_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    form, parts = packed(name)
    expected = torch.empty(COUNT, ROWS, COLUMNS, dtype=dtype)
    form.fill_by_torch(parts, expected)
    if name == "mxfp4":
        assert expected.mT.equal(convert_moe_packed_tensors(parts["blocks"], parts["scales"], dtype=dtype))
    on_card = {key: part.cuda() for key, part in parts.items()}
    for is_transposed in (False, True):
        shape = (COUNT, COLUMNS, ROWS) if is_transposed else (COUNT, ROWS, COLUMNS)
        found = torch.empty(shape, dtype=dtype, device="cuda")
        form.fill(on_card, found.mT if is_transposed else found)
        seen = (found.mT if is_transposed else found).cpu()
        assert seen.isnan().equal(expected.isnan())
        assert seen.nan_to_num(9).equal(expected.nan_to_num(9))
    assert form.coded(on_card, dtype) is not None
    assert not matrix._fill_rows._fails
