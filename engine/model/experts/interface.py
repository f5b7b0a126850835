"""The experts function that `transformers` layers call, and the check of which modules it supports."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from engine.kernels.grouped.gating import Gating
from engine.kernels.grouped.matrices import Matrices
from engine.kernels.grouped.mixture import mixture
from engine.kernels.grouped.stack import Stack
from engine.model.sweep_context import SweepContext

EXPERTS_NAME = "flexgen"
"""The name under which `transformers` finds our experts function."""
_FLAGS = ("has_gate", "has_bias", "is_transposed")
"""The attributes that the interface sets on every module of experts."""
_SIZES = (0.1, 1.0, 30.0)
"""The magnitudes of the numbers with which a gate is tested: the largest reach its limits."""
_ROWS = 4
"""The number of rows of each magnitude."""


def experts(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The function registered with `transformers.ExpertsInterface`, for supported modules.

    hidden_states: `[rows, hidden size]`, returned in the same shape; the others `[rows, choices]`.
    """
    if hidden_states.is_meta:
        return torch.empty_like(hidden_states)
    context: SweepContext = module.__dict__["sweeping"]
    if context.ask_experts is not None:
        return context.ask_experts(module, hidden_states, top_k_index, top_k_weights)
    return compute(module, hidden_states, top_k_index, top_k_weights)


def compute(module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The result of `experts`, without waiting for other micro-batches."""
    context: SweepContext = module.__dict__["sweeping"]
    with context.apart():
        return mixture(_matrices(module), hidden, index, weights)


def take_experts(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Have the experts of `model` computed by our function, if it supports all of them.

    Returns the configs that say so now; none if `transformers`' own functions stay in use.
    """
    modules = _modules_of_experts(model)
    if not all(map(is_understood, modules)):
        return []
    for module in modules:
        prepare(module)
    configs = _configs_of(modules)
    for config in configs:
        config._experts_implementation = EXPERTS_NAME
    return configs


def prepare(module: nn.Module) -> None:
    """Note in a supported module what its gate is, for our function."""
    module.__dict__["gating"] = gating_of(module)


def keep_experts_apart(model: PreTrainedModel) -> None:
    """Have experts computed one after the other by `transformers`, each with products of its own rows."""
    for config in [model.config, model.config.get_text_config(), *_configs_of(_modules_of_experts(model))]:
        config._experts_implementation = "eager"


@contextmanager
def stock_experts(model: PreTrainedModel, configs: list[PreTrainedConfig]) -> Iterator[None]:
    """Inside, experts that `configs` assign to our function are computed as `from_pretrained` does by default."""
    for config in configs:
        config._experts_implementation = model.get_correct_experts_implementation(None)
    try:
        yield
    finally:
        for config in configs:
            config._experts_implementation = EXPERTS_NAME


def is_understood(module: nn.Module) -> bool:
    """Whether a module of experts consists of nothing but two matrices per expert, in one of the known layouts.

    Other settings of transformers' interface (a norm after the experts, say) and parameters of other names or sizes
    leave a module to transformers' own functions.
    """
    told = vars(module)
    # transformers 5.17 tells neither of norms behind experts nor of experts on several devices: it has no such.
    has_norm = told.get("has_post_expert_norm", hasattr(module, "post_expert_norm"))
    if any(type(told.get(flag)) is not bool for flag in _FLAGS) or has_norm is not False:
        return False
    first = "gate_up_proj" if told["has_gate"] else "up_proj"
    names = {first, "down_proj"} | ({f"{first}_bias", "down_proj_bias"} if told["has_bias"] else set())
    found = dict(module.named_parameters())
    is_spread = told.get("_is_expert_parallel", False)
    if is_spread is not False or found.keys() != names or list(module.named_buffers()):
        return False
    if found[first].ndim != 3 or found["down_proj"].ndim != 3:
        return False
    matrices = _matrices(module)
    count, width, between = matrices.first.shape
    inner = between // 2 if told["has_gate"] else between
    biases = [x.shape for x in (matrices.first_bias, matrices.second_bias) if x is not None]
    return (
        count == told.get("num_experts")
        and between == inner * (2 if told["has_gate"] else 1)
        and matrices.second.shape == (count, inner, width)
        and biases in ([], [(count, between), (count, width)])
    )


def _matrices(module: nn.Module) -> Matrices:
    """Views of the parameters of a supported module, which each sweep may bind to other memory."""
    told: Any = module
    first, second = (stack_of(module, name) for name in matrix_names(module))
    first_bias = (told.gate_up_proj_bias if told.has_gate else told.up_proj_bias) if told.has_bias else None
    second_bias = told.down_proj_bias if told.has_bias else None
    if not told.is_transposed:
        first, second = first.mT, second.mT
    activation = told._apply_gate if told.has_gate else told.act_fn
    return Matrices(first, second, first_bias, second_bias, activation, told.__dict__.get("gating"))


def matrix_names(module: nn.Module) -> tuple[str, str]:
    """The names of the two products' parameters in a supported module."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def names_of_matrices(model: PreTrainedModel) -> frozenset[str]:
    """The full names of the parameters that `experts` multiplies with, in a model whose experts it computes."""
    ours = {id(module) for module in _modules_of_experts(model)}
    named = [(prefix, module) for prefix, module in model.named_modules() if id(module) in ours]
    return frozenset(f"{prefix}.{name}" for prefix, module in named for name in matrix_names(module))


def bind_stack(module: nn.Module, name: str, stack: Stack | None) -> None:
    """Make `experts` take a module's matrices of this name from `stack`; None: from the parameter."""
    stacks: dict[str, Stack] = module.__dict__.setdefault("stacks", {})
    if stack is None:
        stacks.pop(name, None)
    else:
        stacks[name] = stack


def stack_of(module: nn.Module, name: str) -> Stack:
    """The matrices of this name that `experts` uses: the bound stack, else the parameter."""
    found: Stack | None = module.__dict__.get("stacks", {}).get(name)
    return Stack.of(getattr(module, name)) if found is None else found


def gating_of(module: nn.Module) -> Gating | None:
    """The gate that a module computes for rows of its own dtype, found by calling it; None if it is unknown."""
    told: Any = module
    if not told.has_gate:
        return None
    dtype, width = told.down_proj.dtype, told.down_proj.shape[1 if told.is_transposed else 2]
    numbers = torch.randn(_ROWS, 2 * width, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([numbers * size for size in _SIZES]).to(dtype)
    try:
        found = told._apply_gate(rows)
    except Exception:  # it does not run on the host, or not in this dtype
        return None
    limits = [math.inf, *_numbers(module, "limit", "swiglu_limit")]
    alphas = [None, *_numbers(module, "alpha", "swiglu_alpha")]
    known = (Gating(*each) for each in itertools.product((False, True), limits, alphas))
    return next((gating for gating in known if torch.equal(found, gating(rows))), None)


def _numbers(module: nn.Module, *names: str) -> list[float]:
    return [float(value) for name in names if isinstance(value := getattr(module, name, None), int | float)]


def _modules_of_experts(model: nn.Module) -> list[nn.Module]:
    """The modules that ask transformers' interface for the function that computes their experts."""
    return [module for module in model.modules() if vars(module).keys() >= set(_FLAGS)]


def _configs_of(modules: list[nn.Module]) -> list[Any]:
    """The configs that choose that function, without duplicates."""
    return list({id(module.config): module.config for module in modules}.values())


ExpertsInterface.register(EXPERTS_NAME, experts)
