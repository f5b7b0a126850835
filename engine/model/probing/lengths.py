"""Finds layers that count the rows of a call on from the length of their cache, instead of using positions."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from engine.model.attention.mask import noting_masks
from engine.model.attention.probe import call_on_meta
from engine.model.drivable import Drivable
from engine.model.padded import CacheView
from engine.model.probing.forward import inputs_of, outer_zeros
from engine.model.probing.length_view import LengthView

_NUMBERS = {"layer_idx", "layer_index", "layer_id"}
"""The attribute names of a module's layer number."""


def asks_lengths(model: Drivable) -> bool:
    """Whether layers ask their cache for its length, as far as calls on `meta` show it."""
    view, context = LengthView(model.sweeping), model.sweeping
    reaches, is_plain = dict(context.reaches), context.is_plain
    rows = torch.zeros(1, 2, dtype=torch.long)
    with suppress(Exception):  # of families that want another cache, which layers do not get here
        with outer_zeros(model), noting_masks() as context.masks:
            hidden, calls = model.record(inputs_of(model, rows) | {"use_cache": True, "cache": CacheView(view)})
        view.begin_layers(rows)
        for index in _first_of_each(model.layers):
            context.layer, context.probed = index, None
            with suppress(Exception):
                call = calls[index]
                call_on_meta(model.layers[index], call.laid_out(hidden), call.args, call.kwargs)
    context.reaches, context.is_plain = reaches, is_plain
    return view.is_asked


def _first_of_each(layers: list[nn.Module]) -> list[int]:
    """The first layer of each kind, by its modules and their settings, except the layer number."""
    found: dict[tuple[Any, ...], int] = {}
    for index, layer in enumerate(layers):
        found.setdefault(settings_of(layer), index)
    return [*found.values()]


def settings_of(module: nn.Module) -> tuple[Any, ...]:
    """The settings that distinguish modules of the same class: all but the layer number."""
    return tuple(_settings(name, each) for name, each in module.named_modules())


def _settings(name: str, module: nn.Module) -> tuple[Any, ...]:
    told = {key: each for key, each in vars(module).items() if type(each) in (bool, int, float, str)}
    return name, type(module), *((key, each) for key, each in told.items() if key not in _NUMBERS)
