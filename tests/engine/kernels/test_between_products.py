"""Protects: the Triton kernels of gated products and merged attention give what torch's functions give."""

from __future__ import annotations

from interpreter import interpreted

_SCRIPT = """
import torch
from engine.kernels.elementwise.gate_kernel import gate_product
from engine.kernels.elementwise.gates import Activation, gated
from engine.kernels.elementwise.merge_kernel import merge_parts
from engine.kernels.elementwise.merges import merge

torch.manual_seed(0)
for activation in Activation:
    both = (torch.randn(1, 6, 96) * torch.logspace(-3, 2, 6)[:, None]).half()
    wide = torch.randn(3, 2, 2500).half()
    for gate, up in (both.chunk(2, dim=-1), (wide, wide.flip(0)), (wide[..., ::2], wide[..., 1::2])):
        found, expected = gate_product(gate, up, activation), gated(gate, up, activation)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4)
        assert (found == expected).float().mean() > 0.98
    print("same")
for rows, heads, dim in ((7, 3, 80), (130, 2, 64)):
    own, shared = torch.randn(2, rows, heads, dim).half()
    sums = torch.randn(2, heads, rows + 5) * 3
    sums[1, 0, 0], sums[0, 0, 1] = float("-inf"), float("-inf")
    found, expected = own.clone(), own.clone()
    for made, by in ((found, merge_parts), (expected, merge)):
        by(made, sums[0, :, :rows], shared, sums[1, :, :rows])
    assert (found == expected).float().mean() > 0.99
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(found[0, 0], own[0, 0]) and torch.equal(found[1, 0], shared[1, 0])
    print("merged")
"""


def test_the_kernels_give_in_tritons_interpreter_what_torch_gives() -> None:
    assert interpreted(_SCRIPT) == ["same"] * 3 + ["merged"] * 2
