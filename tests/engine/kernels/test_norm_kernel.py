"""Protects: the Triton kernel of norms gives what torch's functions give, for rows of any width and layout."""

from __future__ import annotations

from interpreter import interpreted

_SCRIPT = """
import torch
from engine.kernels.elementwise.norm_kernel import norm
from engine.kernels.elementwise.norms import LayerNorm, RMSNorm, Scaling

torch.manual_seed(0)
for scaling in Scaling:
    told = RMSNorm(1e-5, scaling)
    for rows, width in ((torch.randn(3, 5, 4, 48), 48), (torch.randn(7, 200)[:, 20:170], 150)):
        sizes = torch.logspace(-4, 1, len(rows)).view(-1, *[1] * (rows.ndim - 1))  # the smallest show what is added
        rows, weight = (rows * sizes).half(), torch.randn(width).half()
        found = norm(rows, weight, told.eps, told.scaling)
        torch.testing.assert_close(found, told(rows, weight), rtol=2e-3, atol=1e-3)
        assert (found == told(rows, weight)).float().mean() > 0.99
        assert torch.equal(norm(rows[1:2], weight, told.eps, told.scaling), found[1:2])
    print("same")
for width in (48, 150):
    rows, weight, bias = (torch.randn(6, width) + 2).half(), torch.randn(width).half(), torch.randn(width).half()
    rows *= torch.logspace(-3, 1, 6)[:, None].half()
    told = LayerNorm(1e-5)
    found, expected = norm(rows, weight, told.eps, told.scaling, bias), told(rows, weight, bias)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    assert (found == expected).float().mean() > 0.98
    assert torch.equal(norm(rows[1:2], weight, told.eps, told.scaling, bias), found[1:2])
    print("centred")
"""


def test_the_kernel_norms_rows_in_tritons_interpreter() -> None:
    assert interpreted(_SCRIPT) == ["same"] * 3 + ["centred"] * 2
