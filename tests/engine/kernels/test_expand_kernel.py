"""Protects: the Triton kernel expands packed matrices to the numbers of the formats' own arithmetic, in any layout."""

from __future__ import annotations

from interpreter import interpreted

_SCRIPT = """
import torch
from engine.kernels.packed.expand_kernel import expand
from engine.kernels.packed.fours import MxFp4Blocks
from engine.kernels.packed.matrix import PartForm
from engine.kernels.packed.numbers import PackedIntegers, ScaledBlocks

# Without bfloat16, which the interpreter cuts off instead of rounding.
torch.manual_seed(0)
count, rows, columns = 2, 70, 96
def forms(parts):
    return {name: PartForm(part.dtype, part.shape[1:]) for name, part in parts.items()}
def same(form, parts, expected):
    for dtype in (torch.float16, torch.float32):
        for target in (torch.empty(count, rows, columns), torch.empty(count, columns, rows).mT):
            target = target.to(dtype)
            expand(form.coded(parts, dtype), target)
            torch.testing.assert_close(target, expected(dtype), rtol=0, atol=0, equal_nan=True)
            assert target.eq(0).logical_and(target.signbit()).equal((want := expected(dtype)).eq(0) & want.signbit())
    print("same")

# GPT-OSS's; the largest exponent stands for no number.
blocks = torch.randint(256, (count, rows, 3, 16), dtype=torch.uint8)
scales = torch.randint(90, 150, (count, rows, 3), dtype=torch.uint8)
scales[0, 0], scales[0, 1, 0], scales[-1, -1], scales[0, 3] = 254, 2, 0, 255
parts = {"blocks": blocks, "scales": scales}
table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.double)
halves = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).long()
exact = torch.cat((table, -table))[halves] * torch.exp2(scales.double() - 127)[..., None]
exact[scales == 255] = torch.nan
same(MxFp4Blocks(torch.Size((rows, columns)), forms(parts)), parts, exact.flatten(2).float().to)

# DeepSeek's: all codes of the type, blocks that end within the matrix, scales that are numbers and exponents.
bytes_ = torch.arange(count * rows * columns).view(count, rows, columns).to(torch.uint8)
weight = bytes_.view(torch.float8_e4m3fn)
grid = torch.rand(count, -(-rows // 32), -(-columns // 40)) + 0.01
parts = {"weight": weight, "weight_scale_inv": grid}
whole = grid.repeat_interleave(32, 1)[:, :rows].repeat_interleave(40, 2)[..., :columns]
form = ScaledBlocks(torch.Size((rows, columns)), forms(parts), block=(32, 40))
same(form, parts, lambda dtype: (weight.float() * whole).to(dtype))
form = ScaledBlocks(torch.Size((rows, columns)), forms(parts), block=(32, 40), wide=False)
same(form, parts, lambda dtype: weight.to(dtype) * whole.to(dtype))
parts["weight_scale_inv"] = (grid * 20 + 110).to(torch.uint8).view(torch.float8_e8m0fnu)
whole = torch.exp2((grid * 20 + 110).to(torch.uint8).float() - 127)
whole = whole.repeat_interleave(32, 1)[:, :rows].repeat_interleave(40, 2)[..., :columns]
form = ScaledBlocks(torch.Size((rows, columns)), forms(parts), block=(32, 40))
same(form, parts, lambda dtype: (weight.float() * whole).to(dtype))

# Kimi-K2's: words of whole numbers, in the type of the scales and in the model's.
numbers = torch.randint(16, (count, rows, columns))
words = (numbers.unflatten(2, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)
scales = torch.randn(count, rows, columns // 32).half()
parts = {"weight_packed": words, "weight_scale": scales}
product = (numbers - 8).half() * scales.repeat_interleave(32, 2)
same(PackedIntegers(torch.Size((rows, columns)), forms(parts), in_scale_type=True), parts, product.to)
wide = lambda dtype: (numbers - 8).to(dtype) * scales.to(dtype).repeat_interleave(32, 2)
same(PackedIntegers(torch.Size((rows, columns)), forms(parts)), parts, wide)
"""


def test_the_kernel_expands_as_the_formats_do_in_tritons_interpreter() -> None:
    assert interpreted(_SCRIPT) == ["same"] * 6
