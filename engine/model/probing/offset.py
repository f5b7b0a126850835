"""Families whose positions begin behind 0: RoBERTa and its kin, which keep a place for padding."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from engine.model.drivable import Drivable
from engine.model.probing.forward import inputs_of, outer_zeros
from engine.model.undrivable import UndrivableError

_ROWS = 3


class _LookUps(TorchFunctionMode):
    """Notes what is looked up in tables."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.embedding:
            self.found.append((args[0] if args else (kwargs or {})["input"]).flatten().clone())
        return func(*args, **(kwargs or {}))


def position_offset(model: Drivable) -> int:
    """How much larger the positions are that the model's own forward counts than those from 0 on.

    That is what its tables are looked up with when it is given no positions. Raises `UndrivableError` where it looks up
    something else.
    """
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = torch.full((1, _ROWS), 1 if padding == 0 else 0)
    given = inputs_of(model, torch.arange(_ROWS)[None]) | {"input_ids": ids}
    counted = {key: value for key, value in given.items() if key != "position_ids"}
    found = []
    for inputs in (given, counted):
        with outer_zeros(model), _LookUps() as look_ups:
            model.record(inputs)
        found.append(look_ups.found)
    if [each.shape for each in found[0]] != [each.shape for each in found[1]]:
        raise UndrivableError("it looks up other tables when it is given positions")
    apart = {int(step) for one, other in zip(*found, strict=True) for step in (other - one).unique()}
    offsets = apart - {0}
    if len(offsets) > 1 or any(len((other - one).unique()) > 1 for one, other in zip(*found, strict=True)):
        raise UndrivableError("it counts positions in a way of its own")
    return offsets.pop() if offsets else 0
