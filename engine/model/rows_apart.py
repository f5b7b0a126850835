"""Checks that rows of a layer interact in its attention alone: a layer that mixes them elsewhere is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from engine.errors import UnsupportedError, named
from engine.model.stub import LayerCall
from engine.model.sweep_context import SweepContext
from engine.model.undrivable import UndrivableError

_WHOLE = 1 << 14
"""Parameters of at most so many numbers get random values; products with larger ones are replaced."""
_WHOLE_IN_MODULE = 1 << 22
"""The same limit where one module is tried by itself."""
_SEEDS = 3
_TOLERANCE = 0.01
"""The tolerance for outputs, relative to the largest: mixed rows differ by far more, and rounding by far less."""

Calls = tuple[LayerCall, list[LayerCall]]
"""How a layer is called for several rows together, and for each of them alone."""


class NoNumbersError(Exception):
    """Raised when the layer uses a matrix in a way that cannot be replaced, so that nothing can be checked."""


class Sketch(TorchFunctionMode):
    """Replaces products with matrices that have no storage by cheap ones in which rows do not interact.

    A layer of any size then takes milliseconds. Every row of a product is a function of that row and of the sizes.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {**(kwargs or {})}
        tensors = [value for value in (*args, *given.values()) if isinstance(value, torch.Tensor)]
        if not any(x.is_meta for x in tensors) or all(x.is_meta for x in tensors):
            return func(*args, **given)
        name = getattr(func, "__name__", "")
        if name == "linear":
            return row_product(args[0], (args[1] if len(args) > 1 else given["weight"]).shape[-2])
        if name in ("matmul", "mm", "bmm", "__matmul__", "_grouped_mm", "grouped_mm") and args[1].is_meta:
            return row_product(args[0], args[1].shape[-1])
        if name in ("matmul", "__matmul__") and args[0].is_meta:
            return row_product(args[1].mT, args[0].shape[-2]).mT
        if name in ("addmm", "baddbmm") and args[2].is_meta:
            return row_product(args[1], args[2].shape[-1])
        if name == "embedding" and not args[0].is_meta:
            steps = torch.arange(1, args[1].shape[-1] + 1) * 0.37
            return torch.sin(args[0][..., None] * steps)
        if name in ("__get__", "__getitem__", "__set__", "size", "dim", "type_as"):
            return func(*args, **given)
        raise NoNumbersError(name)


def row_product(rows: torch.Tensor, width: int) -> torch.Tensor:
    """`[…, n]` -> `[…, width]`, each row from its own numbers."""
    at, out = torch.arange(rows.shape[-1], dtype=torch.float32), torch.arange(width, dtype=torch.float32)
    inner = torch.sin(torch.outer(at, torch.tensor([0.7, 1.3, 2.1, 2.9])) + 0.5) / max(rows.shape[-1], 1) ** 0.5
    outer = torch.sin(torch.outer(torch.tensor([1.1, 1.7, 2.3, 3.1]), out) + 0.25)
    product: torch.Tensor = rows.float() @ inner @ outer
    return product.to(rows.dtype)


def check_rows_apart(layers: list[nn.Module], context: SweepContext, width: int, calls: list[Calls]) -> bool:
    """Call the last one of `layers` with rows together and alone, with attention and mixers replaced.

    The layers before it produce the values that it gets in addition to hidden states, if any. Returns True where its
    output is the same, False where nothing can be checked: a layer uses its matrices in ways that are not replaced.
    Raises `UnsupportedError` where its output differs, where it attends more than once, or where it does not run.
    """
    layer = layers[-1]
    with ExitStack() as numbers, torch.no_grad():
        for each in layers:
            numbers.enter_context(numbers_in(each))
        for seed in range(_SEEDS):
            try:
                if _is_apart(layers, context, width, calls, seed):
                    return True
            except (UnsupportedError, NoNumbersError) as error:
                if isinstance(error, UnsupportedError):
                    raise
                return False
            except Exception as error:
                if "meta" in str(error):  # a matrix without numbers
                    return False
                raise UnsupportedError(
                    f"layer {context.layer} ({type(layer).__name__}) does not run: {named(error)}"
                ) from None
    raise UndrivableError(
        "its layers mix tokens outside their attention, so that a result would depend on the rest of the batch "
        f"({type(layer).__name__})"
    )


def _is_apart(layers: list[nn.Module], context: SweepContext, width: int, calls: list[Calls], seed: int) -> bool:
    shape = calls[-1][0].shape
    count = shape[0] * shape[1]
    hidden = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    with Sketch(), context.arithmetic:
        for layer, (together, alone) in zip(layers, calls, strict=True):
            context.attended = 0
            try:
                whole = states_of(layer, hidden, together)
            finally:
                if context.attended > 1:
                    raise UnsupportedError("its layers attend more than once")
            single = [states_of(layer, hidden[i : i + 1], call) for i, call in enumerate(alone)]
    apart = whole.reshape(count, -1) - torch.stack(single).reshape(count, -1)
    tolerance = 0.0 if context.is_batch_invariant else _TOLERANCE
    return not bool(apart.abs().max() > tolerance * whole.abs().max())


def states_of(layer: nn.Module, hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:
    """A layer's output for float32 rows `[rows, width]`, when it is called as its model calls it."""
    args, kwargs = mapped(_as_float, call.given())
    return call.streams.flat(call.states_of(layer(call.laid_out(hidden), *args, **kwargs)))


def _as_float(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.is_floating_point() else value


def mapped(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """An argument with its tensors mapped."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(mapped(change, item) for item in value)
    return {key: mapped(change, item) for key, item in value.items()} if type(value) is dict else value


@contextmanager
def numbers_in(layer: nn.Module, whole: int = _WHOLE) -> Iterator[None]:
    """Inside, parameters of at most `whole` numbers, and vectors, have random values; experts are computed in a loop.

    All floating-point numbers are float32.
    """
    generator = torch.Generator().manual_seed(0)
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in layer.modules()]
    configs = {id(c): c for m in layer.modules() if (c := getattr(m, "config", None)) is not None}.values()
    experts = [(config, getattr(config, "_experts_implementation", None)) for config in configs]
    try:
        for module, parameters, buffers in before:
            for name, parameter in parameters.items():
                if parameter is not None:
                    module._parameters[name] = _numbers(parameter, generator, whole)
            for name, buffer in buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[name] = buffer.float()
        for config, _ in experts:
            config._experts_implementation = "eager"
        yield
    finally:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for config, told in experts:
            config._experts_implementation = told


@contextmanager
def tried(layer: nn.Module, kind: str, refusal: type[UnsupportedError]) -> Iterator[None]:
    """Inside, a module of a layer, called `kind`, may be called with a few rows of random numbers.

    Where it has no numbers to compute with, the rest is skipped. An `UnsupportedError` is passed on; any other error
    becomes a `refusal`.
    """
    with numbers_in(layer, _WHOLE_IN_MODULE), Sketch(), torch.no_grad():
        try:
            yield
        except NoNumbersError:
            pass
        except UnsupportedError:
            raise
        except Exception as error:
            if "meta" not in str(error):  # else a matrix without numbers
                raise refusal(f"its {kind} does not run: {named(error)}") from None


def _numbers(parameter: nn.Parameter, generator: torch.Generator, whole: int) -> nn.Parameter:
    if parameter.numel() > whole and parameter.ndim > 1:
        return nn.Parameter(parameter.float(), requires_grad=False)
    numbers = torch.randn(parameter.shape, generator=generator) / max(parameter.shape[-1:] or [1]) ** 0.5
    return nn.Parameter(numbers if parameter.ndim > 1 else 1 + 0.1 * numbers, requires_grad=False)
