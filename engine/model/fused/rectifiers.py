"""Finds linear layers whose output only a ReLU uses, by calling their decoder layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from engine.kernels import compiled
from engine.kernels.elementwise.rectified import rectified_product
from engine.model.drivable import Drivable
from engine.model.probing.forward import inputs_of, outer_zeros
from engine.model.rows_apart import Sketch, numbers_in, states_of
from engine.model.stub import LayerCall
from engine.model.sweep_context import SweepContext

_ROWS = 3
"""The number of rows with which a layer is called."""

Pair = tuple[str, str]
"""The names of a linear layer and of the ReLU that takes its output."""


@dataclass(eq=False)
class _Handed:
    """The output of a linear layer that the ReLU has not taken yet."""

    rows: torch.Tensor | None = None


def fuse_rectifiers(model: Drivable, device: torch.device, dtype: torch.dtype) -> None:
    """Fuse ReLU into the linear layers of `model` whose output nothing else uses.

    Only on CUDA devices, in 16 bits; not with `batch-invariant`, whose products are others.
    """
    is_wanted = device.type == "cuda" and dtype in compiled.DTYPES
    if not is_wanted or model.is_padded or model.sweeping.is_batch_invariant:
        return
    known: dict[Any, list[Pair]] = {}
    """Results by the modules of a layer."""
    for index, layer in enumerate(model.layers):
        if not any(map(_rectifies, layer.modules())):
            continue
        made = type(layer), tuple((name, type(module)) for name, module in layer.named_modules())
        if made not in known:
            known[made] = pairs_of(model, index)
        for pair in known[made]:
            linear, rectifier = map(layer.get_submodule, pair)
            handed = _Handed()
            linear.__dict__["forward"] = partial(_multiplied, linear, linear.forward, handed, model.sweeping)
            rectifier.__dict__["forward"] = partial(_taken, rectifier.forward, handed)


def _rectifies(module: nn.Module) -> bool:
    """Whether a module without parameters equals `relu`, for random numbers."""
    if any(True for _ in module.parameters()) or any(True for _ in module.children()):
        return False
    numbers = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 30
    try:
        found = module(numbers)
    except Exception:  # it takes something else
        return False
    return isinstance(found, torch.Tensor) and torch.equal(found, numbers.relu())


def pairs_of(model: Drivable, index: int) -> list[Pair]:
    """The linear layers within a layer whose output may be rectified before its ReLU gets it, for random rows."""
    layer, context = model.layers[index], model.sweeping
    context.is_checking, context.attended, context.layer = True, 0, index
    try:
        with outer_zeros(model), numbers_in(layer), torch.no_grad(), Sketch():
            hidden, calls = model.record(inputs_of(model, torch.zeros(1, _ROWS, dtype=torch.long)))
            rows = torch.randn(_ROWS, hidden.shape[-1], generator=torch.Generator().manual_seed(0))
            with _watched(layer) as seen:
                expected = states_of(layer, rows, calls[index])
            return [pair for pair in seen if _changes_nothing(layer, pair, rows, calls[index], expected)]
    except Exception:  # a layer that says nothing without weights
        return []
    finally:
        context.is_checking = False


@contextmanager
def _watched(layer: nn.Module) -> Iterator[list[Pair]]:
    """Inside, notes which ReLUs are called with the very tensor that a linear layer returned."""
    given: list[tuple[str, torch.Tensor]] = []
    pairs: list[Pair] = []

    def note_output(name: str, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        given.append((name, output))

    def note_input(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        pairs.extend((linear, name) for linear, output in given if inputs and inputs[0] is output)

    hooks = []
    for name, module in layer.named_modules():
        if type(module) is nn.Linear and module.bias is not None and "forward" not in vars(module):
            hooks.append(module.register_forward_hook(partial(note_output, name)))
        elif _rectifies(module):
            hooks.append(module.register_forward_pre_hook(partial(note_input, name)))
    try:
        yield pairs
    finally:
        for hook in hooks:
            hook.remove()


def _changes_nothing(layer: nn.Module, pair: Pair, rows: torch.Tensor, call: LayerCall, expected: torch.Tensor) -> bool:
    """Whether a layer's result is the same when the linear layer's output is rectified before anything uses it."""
    hook = layer.get_submodule(pair[0]).register_forward_hook(lambda module, inputs, output: output.relu())
    try:
        return torch.equal(states_of(layer, rows, call), expected)
    finally:
        hook.remove()


def _multiplied(
    module: nn.Module,
    plain: Callable[[torch.Tensor], torch.Tensor],
    handed: _Handed,
    context: SweepContext,
    input: torch.Tensor,
) -> torch.Tensor:
    bias = module._parameters["bias"]
    if context.is_stock or bias is None or not compiled.takes(input, bias):
        return plain(input)
    weight = module._parameters["weight"]
    assert weight is not None
    handed.rows = rectified_product(input, weight, bias)
    return handed.rows


def _taken(plain: Callable[[torch.Tensor], torch.Tensor], handed: _Handed, rows: torch.Tensor) -> torch.Tensor:
    """Return rows unchanged if the linear layer has rectified them."""
    known, handed.rows = handed.rows, None
    return rows if rows is known else plain(rows)
