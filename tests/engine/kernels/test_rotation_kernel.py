"""Protects: the Triton kernel of rotary embeddings has the bits of torch's functions, for heads of any layout."""

from __future__ import annotations

from interpreter import interpreted

_SCRIPT = """
import torch
from engine.kernels.rotation_kernel import rotate
from engine.kernels.rotations import rotated

torch.manual_seed(0)
for dim, turned, heads in ((16, 16, 3), (24, 24, 1), (40, 16, 2)):
    query = torch.randn(1, 70, heads * 2, dim).half().transpose(1, 2)
    key = torch.randn(1, heads, 70, 2 * dim).half()[..., dim:]  # a view with gaps
    angles = torch.randn(1, 70, turned // 2).repeat(1, 1, 2)
    cosine, sine = angles.cos().half(), angles.sin().half()
    found, expected = rotate(query, key, cosine, sine), rotated(query, key, cosine, sine)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))
    assert found[0].transpose(1, 2).is_contiguous()
    print("same")
"""


def test_the_kernel_turns_heads_in_tritons_interpreter() -> None:
    assert interpreted(_SCRIPT) == ["same"] * 3
