"""Protects: experts computed by our function are transformers' own, and what is not understood is left to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.moe import use_experts_implementation

from engine.kernels.grouped.gating import Gating
from engine.model.causal_model import CausalModel
from engine.model.experts.interface import EXPERTS_NAME, _modules_of_experts, experts, gating_of, is_understood
from engine.model.stock import StockForward
from engine.model.sweep_context import SweepContext

CPU = torch.device("cpu")
FAMILIES = ["mixtral", "gpt-oss", "deepseek-v3"]
"""Concatenated; interleaved, transposed and with biases; a router of another kind, and a dense layer."""


def module_of(family: str) -> nn.Module:
    """The experts of a family's first layer that has some, with random numbers."""
    config = models.config_of(family, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    found: nn.Module = next(module for module in model.modules() if "_is_expert_parallel" in vars(module))
    generator = torch.Generator().manual_seed(0)
    for parameter in found.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    found.__dict__["sweeping"] = SweepContext()
    return found


@pytest.mark.parametrize("rows", [0, 1, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_loop_of_the_family(family: str, rows: int) -> None:
    module: Any = module_of(family)
    assert is_understood(module)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, module.down_proj.shape[2 if module.is_transposed else 1], generator=generator)
    scores = torch.randn(rows, module.num_experts, generator=generator)
    weights, index = scores.topk(2)
    with torch.no_grad():
        torch.testing.assert_close(experts(module, hidden, index, weights), module(hidden, index, weights))
        if family == "gpt-oss" or not rows:
            return
        index[0, 1] = module.num_experts  # which means none
        torch.testing.assert_close(experts(module, hidden, index, weights), module(hidden, index, weights))


@pytest.mark.parametrize(
    ("family", "gating"),
    [("mixtral", Gating(False)), ("gpt-oss", Gating(True, 7.0, 1.702)), ("deepseek-v3", Gating(False))],
)
def test_gates_are_known_by_what_they_compute(family: str, gating: Gating) -> None:
    """The numbers are those of the families' published configs."""
    module: Any = module_of(family).bfloat16()
    assert gating_of(module) == gating
    module._apply_gate = lambda rows: gating(rows) * 1.01
    assert gating_of(module) is None


@pytest.mark.parametrize(("family", "name"), [("mixtral", "act_fn"), ("gpt-oss", "alpha"), ("gpt-oss", "limit")])
def test_other_gates_are_left_to_the_module(family: str, name: str) -> None:
    module: Any = module_of(family).bfloat16()
    gate = module._apply_gate
    given = {"act_fn": nn.GELU(), "alpha": 1.5, "limit": 3.0}[name]

    def changed(rows: torch.Tensor) -> torch.Tensor:
        """With another number than the one that the module tells of."""
        told = getattr(module, name)
        setattr(module, name, given)
        try:
            return gate(rows)
        finally:
            setattr(module, name, told)

    module._apply_gate = changed
    assert gating_of(module) is None


@use_experts_implementation
class Plain(nn.Module):
    """Experts as `transformers` describes them."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.num_experts = 4
        self.gate_up_proj = nn.Parameter(torch.empty(4, 16, 8))
        self.down_proj = nn.Parameter(torch.empty(4, 8, 8))
        self.act_fn = nn.SiLU()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a norm behind the experts": lambda module: setattr(module, "has_post_expert_norm", True),
    "experts of several devices": lambda module: setattr(module, "_is_expert_parallel", True),
    "one more parameter": lambda module: setattr(module, "scale", nn.Parameter(torch.ones(4))),
    "a parameter of a part": lambda module: setattr(module, "norm", nn.LayerNorm(8)),
    "biases that it does not tell of": lambda module: setattr(module, "down_proj_bias", nn.Parameter(torch.ones(4, 8))),
    "biases that it lacks": lambda module: setattr(module, "has_bias", True),
    "a norm that no flag tells of": lambda module: (
        delattr(module, "has_post_expert_norm"),
        setattr(module, "post_expert_norm", nn.Identity()),
    ),
    "a norm's flag that is no flag": lambda module: setattr(module, "has_post_expert_norm", None),
    "another layout": lambda module: setattr(module, "is_transposed", True),
    "another width between": lambda module: setattr(module, "down_proj", nn.Parameter(torch.ones(4, 8, 4))),
    "fewer experts": lambda module: setattr(module, "num_experts", 3),
    "no gate": lambda module: setattr(module, "has_gate", False),
    "a layout that is not told": lambda module: delattr(module, "is_transposed"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_understood_is_not_ours(change: str) -> None:
    module: Any = Plain(PreTrainedConfig())
    assert is_understood(module)
    CHANGES[change](module)
    assert not is_understood(module)


def test_modules_of_a_transformers_that_tells_less_are_understood() -> None:
    """In 5.17 no flags tell of such norms, nor of experts of several devices, since there are none."""
    module: Any = Plain(PreTrainedConfig())
    del module.has_post_expert_norm
    assert is_understood(module)
    del module._is_expert_parallel
    assert is_understood(module)
    assert _modules_of_experts(nn.Sequential(module)) == [module]


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_model_with_experts_that_are_not_understood_keeps_transformers_own(
    batch_invariant: bool, build: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.model.experts.interface.is_understood", lambda module: False)
    model = CausalModel(build("mixtral"), torch.float32, CPU, batch_invariant=batch_invariant)
    assert model.config._experts_implementation == ("eager" if batch_invariant else "grouped_mm")


def test_stock_layers_compute_experts_as_transformers_does(build: Callable[[str], Path]) -> None:
    model = CausalModel(build("mixtral"), torch.float32, CPU)
    assert model.config._experts_implementation == EXPERTS_NAME
    with StockForward(model).attending():
        assert model.config._experts_implementation == "grouped_mm"
    assert model.config._experts_implementation == EXPERTS_NAME
