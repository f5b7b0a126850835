"""Splits the arguments of a model's layers into tensors and everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from engine.errors import UnsupportedError
from engine.model.stub import LayerCall

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class Arguments:
    """Calls of layers: their distinct tensors, and a form that describes all but the numbers in these."""

    def __init__(self, calls: Sequence[LayerCall], device: torch.device) -> None:
        """Raises `UnsupportedError` for anything but tensors on `device`, plain values, and lists and dicts of them.

        The content of other objects could change from call to call unnoticed.
        """
        self._calls = list(calls)
        self.tensors: list[torch.Tensor] = []
        """The distinct tensors in the order of their first use."""
        numbers: dict[int, int] = {}

        def form_of(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.device == device:
                if id(value) not in numbers:
                    numbers[id(value)] = len(self.tensors)
                    self.tensors.append(value)
                return torch.Tensor, numbers[id(value)], value.shape, value.stride(), value.dtype
            if type(value) in (list, tuple):
                return type(value), [form_of(each) for each in value]
            if type(value) is dict:
                return dict, [(key, form_of(each)) for key, each in value.items()]
            if type(value) in _PLAIN:
                return type(value), value
            raise UnsupportedError(f"its layers are called with a {type(value).__name__} that cannot be recorded")

        self.form: list[Any] = [(call.shape, call.streams, form_of(call.args), form_of(call.kwargs)) for call in calls]
        """A description that is equal for calls that differ in the numbers of their tensors alone."""
        self._numbers = numbers

    def calls_with(self, tensors: Sequence[torch.Tensor]) -> list[LayerCall]:
        """The same calls with other tensors, in the order of `tensors`."""

        def with_others(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return tensors[self._numbers[id(value)]]
            if type(value) in (list, tuple):
                return type(value)(with_others(each) for each in value)
            if type(value) is dict:
                return {key: with_others(each) for key, each in value.items()}
            return value

        return [replace(call, args=with_others(call.args), kwargs=with_others(call.kwargs)) for call in self._calls]
