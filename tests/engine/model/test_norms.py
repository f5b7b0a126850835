"""Protects: a module is taken for a root-mean-square norm only if it computes one, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from engine.kernels import compiled
from engine.kernels.elementwise.norms import LayerNorm, RMSNorm, Scaling
from engine.model.causal_model import CausalModel
from engine.model.fused import norms
from engine.model.fused.norms import norm_of
from engine.model.stock import StockForward
from engine.model.sweep_context import SweepContext

DTYPE = torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "scaling"),
    [(LlamaRMSNorm, Scaling.ROUNDED), (GptOssRMSNorm, Scaling.WIDE), (Gemma2RMSNorm, Scaling.WIDE_FROM_ONE)],
)
def test_norms_of_transformers_are_known_by_what_they_compute(kind: Any, scaling: Scaling) -> None:
    with torch.device("meta"):
        module = kind(48, eps=1e-5).to(DTYPE)
    assert norm_of(module, DTYPE) == RMSNorm(1e-5, scaling)
    assert norm_of(module, torch.float16) is None  # its weight is of another dtype
    layer_norm = nn.LayerNorm(48, eps=1e-4, dtype=DTYPE, device="meta")
    assert norm_of(layer_norm, DTYPE) == LayerNorm(1e-4)


class Norm(nn.Module):
    """As Llama's, but for what a test changes."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(48, dtype=DTYPE))
        self.eps = 1e-5
        self.used = {"eps": 1e-5, "shift": 0.0, "power": -0.5, "middle": 0.0, **changes}

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        wide = rows.float()
        wide = wide - self.used["middle"] * wide.mean(-1, keepdim=True)
        normed = wide * (wide.pow(2).mean(-1, keepdim=True) + self.used["eps"]).pow(self.used["power"])
        return (self.weight + self.used["shift"]) * normed.to(rows.dtype)


CHANGES = ({"eps": 2e-5}, {"shift": 0.1}, {"power": -0.49}, {"middle": 1.0})


def test_others_are_not_taken_for_one() -> None:
    assert norm_of(Norm(), DTYPE) == RMSNorm(1e-5, Scaling.ROUNDED)
    for changes in CHANGES:
        assert norm_of(Norm(**changes), DTYPE) is None
    biased = Norm()
    biased.bias = nn.Parameter(torch.zeros(48, dtype=DTYPE))
    assert norm_of(biased, DTYPE) is None
    assert norm_of(nn.LayerNorm(48, bias=False, dtype=DTYPE), DTYPE) is None
    assert norm_of(nn.Linear(48, 48, bias=False, dtype=DTYPE), DTYPE) is None


def test_stock_layers_compute_their_own(build: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    def kernel(rows: torch.Tensor, weight: torch.Tensor, eps: float, scaling: int, bias: None) -> torch.Tensor:
        calls.append(eps)
        return RMSNorm(eps, Scaling(scaling))(rows, weight)

    monkeypatch.setattr(norms, "kernel_for", lambda device: kernel)
    monkeypatch.setattr(compiled, "is_there", lambda rows: True)
    model = CausalModel(build("llama"), DTYPE, torch.device("cpu"))
    module: Any = model.layers[0].get_submodule("input_layernorm")
    module._parameters["weight"] = nn.Parameter(torch.randn(64).to(DTYPE), requires_grad=False)
    rows = torch.randn(3, 64).to(DTYPE)
    ours = module(rows)
    assert len(calls) == 1
    with StockForward(model).attending():
        assert torch.equal(module(rows), ours)
    assert len(calls) == 1


class GatedNorm(Norm):
    """A norm that may be called with a gate, as Mamba-2's is."""

    def forward(self, rows: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        normed = super().forward(rows)
        return normed if gate is None else normed * gate


def test_a_norm_that_is_called_with_a_gate_computes_it_itself(
    build: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms, "kernel_for", lambda device: lambda rows, *_: torch.zeros_like(rows))
    monkeypatch.setattr(compiled, "is_there", lambda rows: True)
    module, rows = GatedNorm(), torch.randn(3, 48).to(DTYPE)
    expected = module(rows, gate=rows), module(rows, rows)
    norms.fuse_norms([module], SweepContext(), torch.device("cpu"), DTYPE)
    assert not module(rows).any()
    assert torch.equal(module(rows, gate=rows), expected[0])
    assert torch.equal(module(rows, rows), expected[1])


def test_norms_made_alike_are_looked_at_once_and_each_other_one_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[nn.Module] = []

    def noted(module: nn.Module, dtype: torch.dtype) -> norms.Norm | None:
        looked_at.append(module)
        return norm_of(module, dtype)

    def kernel(
        rows: torch.Tensor, weight: torch.Tensor, eps: float, scaling: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return -RMSNorm(eps, Scaling(scaling))(rows, weight)  # not what the module itself gives

    monkeypatch.setattr(norms, "norm_of", noted)
    monkeypatch.setattr(norms, "kernel_for", lambda device: kernel)
    monkeypatch.setattr(compiled, "is_there", lambda rows: True)
    layers = [nn.ModuleList(LlamaRMSNorm(48, eps=eps).to(DTYPE) for eps in (0.1, own)) for own in (0.1, 0.2, 0.3)]
    every = [module for layer in layers for module in layer.children()]
    rows = torch.randn(3, 48).to(DTYPE)
    expected = [module(rows) for module in every]
    norms.fuse_norms(layers, SweepContext(), torch.device("cpu"), DTYPE)
    assert all(torch.equal(module(rows), -one) for module, one in zip(every, expected, strict=True))
    assert looked_at == [every[0], every[3], every[5]]
    norms.fuse_norms(layers, SweepContext(), torch.device("cpu"), DTYPE)  # what is replaced stays so
    assert all(torch.equal(module(rows), -one) for module, one in zip(every, expected, strict=True))
    assert len(looked_at) == 3
