"""Protects: the Triton product is the product, and a row of it has the same bits in tiles of any size."""

from __future__ import annotations

from interpreter import interpreted

_SCRIPT = """
import torch
from engine.kernels.invariant import product_kernel

for batches, rows, inner, columns, dtype in ((1, 5, 100, 70, torch.float16), (3, 70, 64, 33, torch.float32)):
    factors = torch.randn(batches, rows, inner).half()
    matrices = torch.randn(batches, columns, inner).half().mT  # as a linear layer's weight lies
    bias = torch.randn(columns).half()
    found = product_kernel.multiply(factors, matrices, bias, dtype)
    exact = factors.double() @ matrices.double() + bias.double()
    torch.testing.assert_close(found.double(), exact, rtol=1e-3 if dtype == torch.float16 else 1e-5, atol=1e-4)
    assert torch.equal(product_kernel.multiply(factors[:, 2:3], matrices, bias, dtype), found[:, 2:3])
    print("same")
"""


def test_the_kernel_multiplies_in_tritons_interpreter() -> None:
    assert interpreted(_SCRIPT) == ["same"] * 2
