"""Protects: a module is taken for a gated product only if it computes one, to the bit, and only our layers get it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.kernels import compiled
from engine.kernels.elementwise.gates import Activation, gated
from engine.model.causal_model import CausalModel
from engine.model.fused import gates
from engine.model.fused.gates import Gate, gate_of
from engine.model.stock import StockForward

DTYPE = torch.bfloat16
LLAMA = Gate(Activation.SILU, "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", LLAMA),
        ("gemma2", Gate(Activation.GELU_TANH, "gate_proj", "up_proj", "down_proj")),
        ("phi3", Gate(Activation.SILU, "gate_up_proj", None, "down_proj")),
        ("gpt-neox", None),  # one matrix before the activation, which multiplies nothing
    ],
)
def test_modules_of_transformers_are_known_by_what_they_compute(
    family: str, expected: Gate | None, build: Callable[[str], Path]
) -> None:
    model = CausalModel(build(family), DTYPE, torch.device("cpu"))
    assert gate_of(model.layers[0].get_submodule("mlp"), DTYPE) == expected


class Gated(nn.Module):
    """As Llama's, but for what a test changes."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        with torch.device("meta"):
            self.gate_proj, self.up_proj = nn.Linear(48, 96, dtype=DTYPE), nn.Linear(48, 96, dtype=DTYPE)
            self.down_proj = nn.Linear(96, 48, dtype=DTYPE)
        self.used = {"scale": 1.0, "limit": 1e9, "shift": 0.0, "behind": 1.0, "wide": False, "mixed": 0, **changes}

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(rows * self.used["scale"]), self.up_proj(rows)
        gate = gate.clamp(max=self.used["limit"])
        if self.used["wide"]:
            product = (F.silu(gate.float()) * up).to(rows.dtype)
        else:
            product = F.silu(gate) * (up + self.used["shift"])
        found: torch.Tensor = self.down_proj(product.roll(self.used["mixed"], dims=-2))
        return found * self.used["behind"]


CHANGES = ({"scale": 1.1}, {"limit": 200.0}, {"shift": 1.0}, {"behind": 2.0}, {"wide": True}, {"mixed": 1})


def test_others_are_not_taken_for_one() -> None:
    assert gate_of(Gated(), DTYPE) == LLAMA
    for changes in CHANGES:
        assert gate_of(Gated(**changes), DTYPE) is None, changes
    with_more = Gated()
    with_more.bias = nn.Parameter(torch.zeros(48, dtype=DTYPE))
    assert gate_of(with_more, DTYPE) is None
    assert gate_of(nn.Sequential(nn.Linear(48, 48, dtype=DTYPE), nn.Linear(48, 48, dtype=DTYPE)), DTYPE) is None


def test_stock_layers_compute_their_own(build: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def kernel(gate: torch.Tensor, up: torch.Tensor, activation: int) -> torch.Tensor:
        calls.append(activation)
        return gated(gate, up, Activation(activation))

    monkeypatch.setattr(gates, "kernel_for", lambda device: kernel)
    monkeypatch.setattr(compiled, "is_there", lambda rows: True)
    model = CausalModel(build("llama"), DTYPE, torch.device("cpu"))
    assert len({id(vars(layer.get_submodule("mlp"))["forward"]) for layer in model.layers}) == len(model.layers)
    module = model.layers[1].get_submodule("mlp")
    for linear in module.children():
        for name, parameter in linear.named_parameters():
            linear._parameters[name] = nn.Parameter(torch.randn(parameter.shape).to(DTYPE), requires_grad=False)
    rows = torch.randn(1, 3, 64).to(DTYPE)
    ours = module(rows)
    assert calls == [Activation.SILU]
    with StockForward(model).attending():
        assert torch.equal(module(rows), ours)
    assert len(calls) == 1
