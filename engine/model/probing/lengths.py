"""Layers that count the rows of a call on from the length of their cache, instead of taking positions."""

from __future__ import annotations

from contextlib import suppress

import torch

from engine.model.attention.mask import noting_masks
from engine.model.attention.probe import call_on_meta
from engine.model.drivable import Drivable
from engine.model.padded import CacheView
from engine.model.probing.forward import inputs_of, outer_zeros
from engine.model.probing.length_view import LengthView


def asks_lengths(model: Drivable) -> bool:
    """Whether layers ask their cache how long it is, as far as that shows when they are called on `meta`."""
    view, context = LengthView(model.sweeping), model.sweeping
    reaches, is_plain = dict(context.reaches), context.is_plain
    rows = torch.zeros(1, 2, dtype=torch.long)
    with suppress(Exception):  # of families that want another cache, which layers do not get here
        with outer_zeros(model), noting_masks() as context.masks:
            hidden, calls = model.record(inputs_of(model, rows) | {"use_cache": True, "cache": CacheView(view)})
        view.begin_layers(rows)
        for index, (layer, call) in enumerate(zip(model.layers, calls, strict=True)):
            context.layer, context.probed = index, None
            call_on_meta(layer, call.laid_out(hidden), call.args, call.kwargs)
    context.reaches, context.is_plain = reaches, is_plain
    return view.is_asked
