"""On a CUDA device our kernels for experts compute what transformers' loop does, with the same bits in any company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import companies
import models
import packers
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from engine import Engine, Job
from engine.kernels.grouped import mixture
from engine.kernels.grouped.stack import Stack
from engine.memory import accelerator
from engine.model.experts.interface import bind_stack, experts, matrix_names, prepare
from engine.model.sweep_context import SweepContext

pytestmark = pytest.mark.gpu

SIZES: dict[str, dict[str, Any]] = {
    "qwen3-moe": {"hidden_size": 512, "moe_intermediate_size": 192, "num_experts": 32, "num_experts_per_tok": 8},
    "gpt-oss": {"hidden_size": 320, "intermediate_size": 336, "num_local_experts": 16, "num_experts_per_tok": 4},
    "deepseek-v3": {"hidden_size": 264, "moe_intermediate_size": 72, "n_routed_experts": 4},
}
"""The last ones fill no tile."""


def module_of(family: str, dtype: torch.dtype) -> Any:
    config = models.config_of(family, num_hidden_layers=2, **SIZES[family])
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    found: nn.Module = next(module for module in model.modules() if "_is_expert_parallel" in vars(module))
    for parameter in found.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.1
    found.__dict__["sweeping"] = SweepContext()
    prepare(found.to(dtype))
    assert dtype is torch.float32 or found.__dict__["gating"] is not None
    return found.to("cuda")


def inputs(module: Any, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = module.down_proj.shape[2 if module.is_transposed else 1]
    choices = module.config.num_experts_per_tok
    weights, index = torch.randn(rows, module.num_experts, device="cuda").softmax(-1).topk(choices)
    return torch.randn(rows, width, device="cuda").to(dtype), index, weights.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", SIZES)
@torch.no_grad()
def test_as_near_to_float64_as_transformers(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = module_of(family, dtype)
    device = torch.device("cuda", torch.cuda.current_device())
    assert mixture._kernel_for(device) is not None or not accelerator.runs_triton(device)
    for rows in (1, 3, 60, 500, 2000):
        given = inputs(module, rows, dtype)
        found, theirs = experts(module, *given), module(*given)
        module.double()
        exact = module(given[0].double(), given[1], given[2].double())
        module.to(dtype)
        error, expected = ((x.double() - exact).norm() / exact.norm() for x in (found, theirs))
        assert error <= 1.2 * expected + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", SIZES)
@torch.no_grad()
def test_no_bit_depends_on_company(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = module_of(family, dtype)
    hidden, index, weights = inputs(module, 3000, dtype)  # large tiles
    whole = experts(module, hidden, index, weights)
    for taken in (slice(0, 1), slice(40, 47), slice(100, 230), slice(1700, 2400)):
        part = experts(module, hidden[taken], index[taken], weights[taken])
        assert torch.equal(part, whole[taken])
    order = torch.randperm(3000, device="cuda")
    assert torch.equal(experts(module, hidden[order], index[order], weights[order]), whole[order])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", SIZES)
@torch.no_grad()
def test_some_experts_at_a_time_are_no_bit_different(family: str, dtype: torch.dtype) -> None:
    """As codes are expanded: into memory in which other experts were before."""
    torch.manual_seed(0)
    module = module_of(family, dtype)
    given = [inputs(module, rows, dtype) for rows in (1, 50, 1000)]
    expected = [experts(module, *each) for each in given]
    for at_once, name in zip((3, 1), matrix_names(module), strict=True):
        numbers = getattr(module, name)
        scratch = torch.full_like(numbers[:at_once], torch.nan)

        def take(first: int, end: int, numbers: torch.Tensor = numbers, scratch: torch.Tensor = scratch) -> Any:
            return scratch.fill_(torch.nan)[: end - first].copy_(numbers[first:end])

        bind_stack(module, name, Stack(numbers.shape, dtype, at_once, take))
    for each, whole in zip(given, expected, strict=True):
        assert torch.equal(experts(module, *each), whole)


@pytest.mark.parametrize("how", ["some at a time", "apart"])
def test_an_engine_that_expands_some_experts_at_a_time_answers_with_the_same_bits(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its micro-batches wait for each other there, and the experts of all their rows are computed at once."""
    directory = packers.save_mxfp4(tmp_path / "model", num_local_experts=16)
    policy = {"device": "cuda", "dtype": "bfloat16", "percent": [0, 100, 0, 100, 0, 100]}
    policy |= {"gpu-batch-size": 2, "num-gpu-batches": 6}
    jobs = [Job(prompt=[*range(20, 60 + 3 * number)], max_new_tokens=5, prompt_logprobs=True) for number in range(9)]
    with Engine.from_pretrained(str(directory), policy=policy) as engine:
        assert engine.parts.plan.expands_whole
        expected = [companies.bits(each) for each in engine.run(jobs)]
    monkeypatch.setattr("engine.planning.demand._EXPANDED_PART", 0.0)
    monkeypatch.setattr("engine.planning.demand._TRANSIT_PART", 0.0 if how == "apart" else 1.0)
    monkeypatch.setattr("engine.weights.stored_form.GROUP_BYTES", 1 << 14)
    with Engine.from_pretrained(str(directory), policy=policy) as engine:
        plan = engine.parts.plan
        assert (plan.expands_whole, plan.experts_apart) == (False, how == "apart")
        assert plan.limits.waiting_rows > 0
        for _ in range(2):
            assert [companies.bits(each) for each in engine.run(jobs)] == expected
        assert engine.parts.lanes[0].executor.limits.waiting_rows > 0  # it was not short of memory
