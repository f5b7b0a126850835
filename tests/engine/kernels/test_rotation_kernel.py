"""Protects: the Triton kernel of rotary embeddings has the bits of torch's functions, for heads of any layout."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch
from interpreter import interpreted

_SCRIPT = """
import torch
from engine.kernels.elementwise.rotation_kernel import rotate
from engine.kernels.elementwise.rotations import rotated

torch.manual_seed(0)
for dim, turned, heads, per_pair in ((16, 16, 3, 2), (24, 24, 1, 2), (40, 16, 2, 2), (24, 24, 2, 1)):
    query = torch.randn(1, 70, heads * 2, dim).half().transpose(1, 2)
    key = torch.randn(1, heads, 70, 2 * dim).half()[..., dim:]  # a view with gaps
    angles = torch.randn(1, 70, turned // 2).repeat(1, 1, per_pair)
    cosine, sine = angles.cos().half(), angles.sin().half()
    found, expected = (turn(query, key, cosine, sine, per_pair) for turn in (rotate, rotated))
    assert all(torch.equal(one, other) for one, other in zip(found, expected))
    assert found[0].transpose(1, 2).is_contiguous()
    print("same")
"""


def test_the_kernel_turns_heads_in_tritons_interpreter() -> None:
    assert interpreted(_SCRIPT) == ["same"] * 4


def test_products_are_rounded_before_they_are_added() -> None:
    """What an H200 runs has no fused operation, as Triton makes of it unless it is told not to; needs no card."""
    triton = pytest.importorskip("triton", reason="Triton has no build for this machine")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from engine.kernels.elementwise import rotation_kernel

    kernel = rotation_kernel._kernel
    launched = mock.MagicMock()
    tensors = [torch.zeros(1, heads, 5, 64, dtype=torch.bfloat16) for heads in (2, 1)]
    with mock.patch.object(rotation_kernel, "_kernel", launched):
        rotation_kernel.rotate(*tensors, *(torch.zeros(1, 5, 64, dtype=torch.bfloat16) for _ in range(2)))
    given = launched.__getitem__.return_value.call_args
    options = {name: value for name, value in given.kwargs.items() if name not in kernel.arg_names}
    constants = {name: value for name, value in given.kwargs.items() if name in kernel.arg_names}
    told = ["*bf16" if isinstance(each, torch.Tensor) else "i32" for each in given.args]
    types = dict(zip(kernel.arg_names[: len(told)], told, strict=True))
    source = ASTSource(kernel, {**types, **dict.fromkeys(constants, "constexpr")}, constexprs=constants)
    program = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert re.search(r"\bmul[.a-z]*\.bf16", program)
    assert not re.search(r"\bfma[.a-z]*\.bf16", program)
