"""On a CUDA device the kernels of norms and of rotary embeddings give what torch's functions give, in any company."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch

from engine.kernels.elementwise import rotations
from engine.kernels.elementwise.norms import LayerNorm, RMSNorm, Scaling, kernel_for
from engine.model.causal_model import CausalModel

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaling", Scaling)
@pytest.mark.parametrize("width", [64, 128, 720, 2048, 8192])
def test_as_by_torch(width: int, scaling: Scaling, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kernel = kernel_for(torch.device("cuda", torch.cuda.current_device()))
    if kernel is None:
        pytest.skip("Triton does not compile for this card")
    told = RMSNorm(1e-6, scaling)
    rows = (torch.randn(1000, width, device="cuda") * torch.logspace(-3, 2, 1000, device="cuda")[:, None]).to(dtype)
    weight = torch.randn(width, device="cuda").to(dtype)
    found, expected = kernel(rows, weight, told.eps, told.scaling, None), told(rows, weight)
    assert (found == expected).float().mean() > 0.99  # sums in another order move a number by one step, rarely
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-3)
    for taken in (slice(0, 1), slice(333, 400)):
        assert torch.equal(kernel(rows[taken], weight, told.eps, told.scaling, None), found[taken])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 720, 7168])
def test_layer_norms_as_by_torch(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kernel = kernel_for(torch.device("cuda", torch.cuda.current_device()))
    if kernel is None:
        pytest.skip("Triton does not compile for this card")
    told, sizes = LayerNorm(1e-5), torch.logspace(-3, 2, 1000, device="cuda")[:, None]
    rows = ((torch.randn(1000, width, device="cuda") + 1) * sizes).to(dtype)
    weight, bias = torch.randn(2, width, device="cuda").to(dtype)
    found, expected = kernel(rows, weight, told.eps, told.scaling, bias), told(rows, weight, bias)
    assert (found == expected).float().mean() > 0.98
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(kernel(rows[333:400], weight, told.eps, told.scaling, bias), found[333:400])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("dim", "turned", "per_pair"), [(64, 64, 2), (128, 128, 2), (80, 80, 2), (256, 64, 2), (64, 64, 1)]
)
def test_rotations_have_the_bits_of_torchs(dim: int, turned: int, per_pair: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kernel = rotations.kernel_for(torch.device("cuda", torch.cuda.current_device()))
    if kernel is None:
        pytest.skip("Triton does not compile for this card")
    query = torch.randn(1, 1000, 24, dim, device="cuda").to(dtype).transpose(1, 2)
    key = torch.randn(1, 4, 1000, dim + 8, device="cuda").to(dtype)[..., 8:]
    angles = torch.randn(1, 1000, turned // 2, device="cuda").repeat(1, 1, per_pair) * 100
    cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)
    found, expected = (turn(query, key, cosine, sine, per_pair) for turn in (kernel, rotations.rotated))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize(("family", "count"), [("qwen3-moe", 5), ("gpt-oss", 3)])
def test_layers_on_a_card_have_them(family: str, count: int, tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    if kernel_for(device) is None:
        pytest.skip("Triton does not compile for this card")
    path = models.save_model(tmp_path, family)
    model = CausalModel(path, torch.bfloat16, device)
    fused = [name for name, module in model.layers[0].named_modules() if "forward" in vars(module)]
    assert len(fused) == count
    assert "self_attn" in fused
