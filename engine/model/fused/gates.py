"""Finds the modules that are gated products between linear layers, by calling them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any

import torch
from torch import nn

from engine.kernels.elementwise.gates import Activation, Kernel, gated, kernel_for
from engine.kernels.host import rows as host_rows
from engine.model.fused.replacing import Replacement, replace
from engine.model.fused.row_kernel import RowKernel, row_kernel
from engine.model.sweep_context import SweepContext

_SIZES = (1e-2, 1.0, 30.0, 1e3)
"""The magnitudes of the numbers with which a module is tested: the largest show where it clamps them."""


@dataclass(frozen=True)
class Gate:
    """A module that computes `last(activation(gate) * up)`, where linear layers compute gate and up of one input."""

    activation: Activation
    first: str
    """The linear layer that computes the gate."""
    second: str | None
    """The linear layer that computes the other factor; None: the first computes both."""
    last: str
    gate_half: int = 0
    """The half of the first layer's output that is the gate, where it computes both."""

    def __call__(self, module: nn.Module, rows: torch.Tensor, product: Callable[..., torch.Tensor]) -> torch.Tensor:
        """The result of `module` for rows, with `product` in place of `gated`."""
        linear, first = module._modules, module._modules[self.first]
        assert first is not None
        gate = up = first(rows)
        if self.second is None:
            halves = gate.chunk(2, dim=-1)
            gate, up = halves[self.gate_half], halves[1 - self.gate_half]
        else:
            up = linear[self.second](rows)  # type: ignore[misc]
        found: torch.Tensor = linear[self.last](product(gate, up, self.activation))  # type: ignore[misc]
        return found


def fuse_gates(layers: Iterable[nn.Module], context: SweepContext, device: torch.device, dtype: torch.dtype) -> None:
    """Replace gated products in `layers` by one kernel each, where there is one for the device and the dtype.

    A module is a gated product if the input of its last linear layer has the bits of `gated`, for random rows.
    """
    kernel: RowKernel[Kernel] | None = row_kernel(device, dtype, kernel_for, host_rows.gate_product)
    if kernel is None:
        return

    def replacement(module: nn.Module) -> Replacement | None:
        told = gate_of(module, dtype)
        return None if told is None else lambda each: partial(_computed, each, each.forward, told, kernel, context)

    within = (module for layer in layers for module in layer.modules() if module is not layer)
    replace(filter(_linear_layers, within), replacement)


def _linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}


def gate_of(module: nn.Module, dtype: torch.dtype) -> Gate | None:
    """The gated product that a module computes for rows of `dtype`; None if it computes something else."""
    linear = _linear_layers(module)
    if len(linear) not in (2, 3) or module._parameters or module._buffers:
        return None
    called: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    """Linear layers in the order of their calls, with inputs and outputs."""
    width = next(iter(linear.values())).in_features
    generator = torch.Generator().manual_seed(0)

    def random_rows(width: int) -> torch.Tensor:
        sizes = torch.tensor(_SIZES)[:, None]
        return (torch.randn(1, len(_SIZES), width, generator=generator) * sizes).to(dtype)

    def stand_in(name: str, rows: torch.Tensor) -> torch.Tensor:
        called.append((name, rows, random_rows(linear[name].out_features)))
        return called[-1][2]

    rows = random_rows(width)
    try:
        with _replaced(linear, stand_in), torch.no_grad():
            found = module(rows)
    except Exception:  # it takes something else than rows, or needs numbers of its own
        return None
    if sorted(name for name, _, _ in called) != sorted(linear):
        return None
    (last, product, result), before = called[-1], called[:-1]
    if not isinstance(found, torch.Tensor) or not torch.equal(found, result):
        return None
    if any(got is not rows and not torch.equal(got, rows) for _, got, _ in before):
        return None
    return next((told for told, made in _candidates(before, last) if _are_equal(made, product)), None)


def _candidates(before: list[tuple[str, torch.Tensor, torch.Tensor]], last: str) -> Iterator[tuple[Gate, torch.Tensor]]:
    """Every way in which the linear layers' outputs may form the product, and its result."""
    for activation in Activation:
        if len(before) == 1:
            ((name, _, both),) = before
            if both.shape[-1] % 2:
                return
            for half in range(2):
                halves = both.chunk(2, dim=-1)
                told = Gate(activation, name, None, last, half)
                yield told, gated(halves[half], halves[1 - half], activation)
        else:
            for (first, _, gate), (second, _, up) in permutations(before):
                if gate.shape == up.shape:
                    yield Gate(activation, first, second, last), gated(gate, up, activation)


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@contextmanager
def _replaced(linear: dict[str, nn.Linear], stand_in: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside, `stand_in` is called in place of linear layers."""
    before = {name: vars(child).get("forward") for name, child in linear.items()}
    try:
        for name, child in linear.items():
            child.__dict__["forward"] = partial(stand_in, name)
        yield
    finally:
        for name, child in linear.items():
            if before[name] is None:
                del child.__dict__["forward"]
            else:
                child.__dict__["forward"] = before[name]


def _computed(
    module: nn.Module,
    plain: Callable[..., torch.Tensor],
    told: Gate,
    kernel: RowKernel[Kernel],
    context: SweepContext,
    hidden_states: torch.Tensor,
    *others: Any,
    **named: Any,
) -> torch.Tensor:
    if others or named or context.is_stock or not kernel.takes(hidden_states):
        return plain(hidden_states, *others, **named)
    return told(module, hidden_states, partial(_product, kernel))


def _product(kernel: RowKernel[Kernel], gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    return (kernel.call if kernel.takes(gate, up) else gated)(gate, up, activation)
