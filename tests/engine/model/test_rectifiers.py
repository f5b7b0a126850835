"""Protects: a linear layer rectifies its output itself only where nothing but a rectifier gets it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from engine.kernels import compiled
from engine.kernels.elementwise.rectified import rectified_product
from engine.model.causal_model import CausalModel
from engine.model.fused import rectifiers
from engine.model.fused.rectifiers import fuse_rectifiers, pairs_of
from engine.model.stock import StockForward

DTYPE = torch.bfloat16
CARD = torch.device("cuda")


@pytest.mark.parametrize(
    ("family", "expected"), [("opt", [("fc1", "activation_fn")]), ("opt-post-norm", [("fc1", "activation_fn")])]
)
def test_layers_of_transformers_are_known_by_what_they_compute(
    family: str, expected: list[tuple[str, str]], build: Callable[[str], Path]
) -> None:
    model = CausalModel(build(family), DTYPE, torch.device("cpu"))
    assert pairs_of(model, 1) == expected


def test_an_output_that_others_get_is_left_as_it_is(
    build: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = OPTDecoderLayer.forward

    def forward(self: OPTDecoderLayer, hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
        wide: list[torch.Tensor] = []
        hook = self.fc1.register_forward_hook(lambda module, inputs, output: wide.append(output))
        found: torch.Tensor = plain(self, hidden_states, **named)
        hook.remove()
        return found + wide[0].amin(-1).view(*found.shape[:-1], 1)

    model = CausalModel(build("opt"), DTYPE, torch.device("cpu"))
    monkeypatch.setattr(OPTDecoderLayer, "forward", forward)
    assert pairs_of(model, 0) == []


@pytest.mark.parametrize("shape", [(1, 0, 8), (0, 8), (2, 3, 8)])
def test_any_number_of_rows_is_multiplied(shape: tuple[int, ...]) -> None:
    rows, weight, bias = torch.randn(shape), torch.randn(5, 8), torch.randn(5)
    torch.testing.assert_close(rectified_product(rows, weight, bias), nn.functional.linear(rows, weight, bias).relu())


def test_layers_compute_the_same_and_stock_ones_their_own(
    build: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def product(*given: torch.Tensor) -> torch.Tensor:
        calls.append(len(given[0]))
        return rectified_product(*given)

    monkeypatch.setattr(rectifiers, "rectified_product", product)
    monkeypatch.setattr(compiled, "is_there", lambda rows: True)
    model = CausalModel(build("opt"), DTYPE, torch.device("cpu"))
    linear, rectifier = (model.layers[0].get_submodule(name) for name in ("fc1", "activation_fn"))
    for name, parameter in linear.named_parameters():
        linear._parameters[name] = nn.Parameter(torch.randn(parameter.shape).to(DTYPE), requires_grad=False)
    rows = torch.randn(5, 64).to(DTYPE)
    expected = rectifier(linear(rows))
    assert not calls  # the CPU's are left as they are
    fuse_rectifiers(model, CARD, DTYPE)
    found = linear(rows)
    assert calls == [5]
    assert found.min() == 0
    torch.testing.assert_close(rectifier(found), expected, rtol=1e-2, atol=1e-2)
    others = torch.randn(5, 64).to(DTYPE)
    assert torch.equal(rectifier(others), others.relu())  # not what the linear layer gave
    with StockForward(model).attending():
        assert torch.equal(rectifier(linear(rows)), expected)
    assert calls == [5]
