"""On a CUDA device the kernels of gated products and of merged attention give what torch's functions give."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch

from engine.kernels.elementwise import gates, merges
from engine.kernels.elementwise.gates import Activation, gated
from engine.kernels.elementwise.rectified import rectified_product
from engine.model.causal_model import CausalModel

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("width", [64, 1000, 14336])
def test_gated_products_as_by_torch(width: int, activation: Activation, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kernel = gates.kernel_for(torch.device("cuda", torch.cuda.current_device()))
    if kernel is None:
        pytest.skip("Triton does not compile for this card")
    sizes = torch.logspace(-3, 2, 400, device="cuda")[:, None]
    both = (torch.randn(1, 400, 2 * width, device="cuda") * sizes).to(dtype)
    gate, up = both.chunk(2, dim=-1)
    found, expected = kernel(gate, up, activation), gated(gate, up, activation)
    # Exponentials by another way move a number by a step, rarely. Below, one and a tangent near minus one cancel.
    assert (found == expected)[gate > -1].float().mean() > 0.999
    lost = 2**-22 * (gate.float() * up.float()).abs() + 1e-7
    assert ((found.float() - expected.float()).abs() <= 2e-2 * expected.float().abs() + lost).all()
    assert torch.equal(kernel(gate[:, 7:9], up[:, 7:9], activation), found[:, 7:9])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "dim"), [(32, 128), (12, 64), (5, 80)])
def test_merged_attention_as_by_torch(
    heads: int, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    kernel = merges.kernel_for(torch.device("cuda", torch.cuda.current_device()))
    if kernel is None:
        pytest.skip("Triton does not compile for this card")
    own, shared = torch.randn(2, 1000, heads, dim, device="cuda").to(dtype)
    sums = torch.randn(2, heads, 1024, device="cuda") * 3
    sums[1, 0, 0], sums[0, 0, 1] = float("-inf"), float("-inf")
    found, expected = own.clone(), own.clone()
    kernel(found, sums[0, :, :1000], shared, sums[1, :, :1000])
    monkeypatch.setattr(merges, "kernel_for", lambda device: None)
    merges.merge(expected, sums[0, :, :1000], shared, sums[1, :, :1000])
    assert (found == expected).float().mean() > 0.999
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(found[0, 0], own[0, 0])
    assert torch.equal(found[1, 0], shared[1, 0])


@pytest.mark.parametrize(("family", "module"), [("llama", "mlp"), ("phi3", "mlp"), ("gemma2", "mlp"), ("opt", "fc1")])
def test_layers_on_a_card_have_them(family: str, module: str, tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    if gates.kernel_for(device) is None:
        pytest.skip("Triton does not compile for this card")
    model = CausalModel(models.save_model(tmp_path, family), torch.bfloat16, device)
    assert "forward" in vars(model.layers[0].get_submodule(module))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rectified_products_as_by_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(3, 70, 512, device="cuda").to(dtype), torch.randn(1000, 512, device="cuda").to(dtype)
    bias = torch.randn(1000, device="cuda").to(dtype)
    found = rectified_product(rows, weight, bias)
    assert found.min() == 0
    exact = (rows.double() @ weight.double().T + bias.double()).relu()
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 3, 210])
def test_what_is_no_number_stays_so_where_sums_are_rectified(count: int, dtype: torch.dtype) -> None:
    """As torch's relu has it: zeros in its place would hide that an answer is worth nothing."""
    torch.manual_seed(0)
    rows, weight = torch.randn(count, 512, device="cuda").to(dtype), torch.randn(1000, 512, device="cuda").to(dtype)
    bias = torch.randn(1000, device="cuda").to(dtype)
    plain = rectified_product(rows, weight, bias)
    bias[3] = float("nan")
    found = rectified_product(rows, weight, bias)
    assert found[:, 3].isnan().all()
    assert found.isnan().sum() == count
    assert plain.isfinite().all()
    rows[-1, 7] = float("nan")
    found = rectified_product(rows, weight, bias)
    assert found[-1].isnan().all()
    assert found.isnan().sum() == len(bias) + count - 1
    assert rectified_product(rows[:0], weight, bias).shape == (0, 1000)
