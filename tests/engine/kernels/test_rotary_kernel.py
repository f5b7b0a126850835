"""Protects: the Triton kernel of rotary embeddings gives the bits that torch's functions give, in any layout."""

from __future__ import annotations

from interpreter import interpreted

_SCRIPT = """
import torch
from engine.kernels.rotary import rotated
from engine.kernels.rotary_kernel import rotate

torch.manual_seed(0)
for heads, rows, dim, width in ((3, 17, 48, 48), (1, 5, 32, 16), (4, 40, 64, 64)):
    cos, sin = (torch.randn(1, rows, 2 * width).half()[..., :width] for _ in range(2))
    packed = torch.randn(1, rows, heads, 2 * dim).half()
    for states in (packed[..., :dim].transpose(1, 2), packed[..., dim:].transpose(1, 2).contiguous()):
        found = rotate(states, cos, sin)
        torch.testing.assert_close(found, rotated(states, cos, sin), rtol=0, atol=0)
        assert found.transpose(1, 2).is_contiguous()
    print("same")
"""


def test_the_kernel_turns_states_in_tritons_interpreter() -> None:
    assert interpreted(_SCRIPT) == ["same"] * 3
