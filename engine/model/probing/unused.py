"""Finds parameters that a model computes no text with: encoders of images and sound, and their projections."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from engine.model.drivable import Drivable
from engine.model.probing.forward import inputs_of, outer_zeros


def unused_parameters(model: Drivable) -> set[str]:
    """The full names of the outer parameters of modules that the model's own forward of text does not call.

    Modules outside the called part (the head) count as used. A parameter that is wrongly taken for unused stays on
    `meta`, where computing with it is an error.
    """
    base = model.module.base_model
    inside = {id(module) for module in base.modules()}
    used = set[int]()

    def note(module: nn.Module, _: Any) -> None:
        used.add(id(module))

    with ExitStack() as stack:
        stack.enter_context(outer_zeros(model))
        for module in base.modules():
            stack.callback(module.register_forward_pre_hook(note).remove)
        model.record(inputs_of(model, torch.zeros(1, 1 if model.is_padded else 2, dtype=torch.long)))
    owners = model.units[1].owners.items()
    return {name for name, (module, _) in owners if id(module) in inside and id(module) not in used}
