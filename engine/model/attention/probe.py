"""Finds the shape of a decoder layer's keys and values by calling it without weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.cache.shape import KVShape
from engine.errors import UnsupportedError
from engine.model.stub import LayerCall
from engine.model.sweep_context import SweepContext


def call_on_meta(layer: nn.Module, hidden: torch.Tensor, args: Any, kwargs: Any) -> Any:
    """The result of `layer`, whose parameters are on `meta`, without numbers."""
    context: SweepContext = layer.__dict__["sweeping"]

    def on_meta(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value if context.masks.knows(value) else value.to("meta")
        if isinstance(value, tuple | list):
            return type(value)(on_meta(item) for item in value)
        return value

    buffers = [(module, dict(module._buffers)) for module in layer.modules()]
    try:
        layer.to("meta")
        with torch.no_grad(), torch.device("meta"):
            return layer(on_meta(hidden), *on_meta(args), **{key: on_meta(value) for key, value in kwargs.items()})
    finally:
        for module, before in buffers:
            module._buffers.update(before)


def probe_kv_shape(layer: nn.Module, hidden: torch.Tensor, call: LayerCall) -> KVShape | None:
    """Call `layer`, whose parameters are on `meta`, until it shows its keys and values; None when it never does.

    hidden: `[rows, width]`, the assumed output of the layer before it.

    Raises `UnsupportedError` for a layer whose attention `attention` does not support.
    """
    context: SweepContext = layer.__dict__["sweeping"]
    context.probed = context.handed_on = None
    try:
        output = call_on_meta(layer, call.laid_out(hidden), *call.given())
        call.states_of(output)
        values = output if isinstance(output, tuple | list) else (output,)
        states, context.handed_on = values[0], sum(value is not None for value in values) - 1
        if isinstance(states, torch.Tensor) and states.dtype.itemsize > hidden.dtype.itemsize:
            context.left = states.dtype
    except UnsupportedError:
        raise
    except Exception:  # what comes after its attention may need real numbers
        if context.probed is None:
            raise
    return context.probed
