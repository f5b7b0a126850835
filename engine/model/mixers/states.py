"""The cache that stock code gets: transformers' own, filled with the states of a group of sequences."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer

from engine.cache.state_shape import StateShape, StateTensor
from engine.errors import UnsupportedError

_KINDS = ("conv", "recurrent")


class EveryLayer(list[Any]):
    """The one layer of a cache, whatever layer is asked for."""

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(0)


class StatesCache(Cache):
    """A transformers cache that holds the states of some sequences in the current layer, and nothing else."""

    def __init__(self, states: States) -> None:
        super().__init__(layers=EveryLayer([states]))
        self.states = states

    def __getattr__(self, name: str) -> Any:
        """The methods `get_X(layer)` and `set_X(layer, tensor)` of families with a cache of their own."""
        verb, _, what = name.partition("_")
        if not what or verb not in ("get", "set"):
            raise AttributeError(name)
        return partial(self._get if verb == "get" else self._set, what)

    def _get(self, what: str, layer_idx: int) -> torch.Tensor | None:
        return self.states.others.get(what)

    def _set(self, what: str, layer_idx: int, state: torch.Tensor) -> None:
        self.states.others[what] = state


class States(LinearAttentionLayer):
    """The states of some sequences in one layer."""

    def __init__(self, number_of_states: int = 1) -> None:
        super().__init__(number_of_states)
        self.others: dict[str, torch.Tensor] = {}
        """The states for which a family's own cache has methods."""

    def begin(self, shape: StateShape, tensors: list[torch.Tensor]) -> None:
        """Set the states after some tokens; tensors: `[sequences, …]`, which are changed in place."""
        for told, tensor in zip(shape.tensors, tensors, strict=True):
            kind, _, number = told.name.partition(" ")
            if kind not in _KINDS:
                self.others[told.name] = tensor
                continue
            index = int(number)
            if kind == "conv":
                self.conv_states[index], self.is_conv_states_initialized[index] = tensor, True
                self.conv_kernel_size[index] = tensor.shape[-1]
            else:
                self.recurrent_states[index], self.is_recurrent_states_initialized[index] = tensor, True
            self.has_previous_state[index] = True

    def held(self) -> dict[str, torch.Tensor]:
        """The states by kind and number, `[sequences, …]`."""
        tables = (self.conv_states, self.recurrent_states)
        return self.others | {
            f"{kind} {index}": tensor
            for kind, table in zip(_KINDS, tables, strict=True)
            for index, tensor in table.items()
            if tensor is not None
        }

    def taken(self, shape: StateShape, count: int) -> list[torch.Tensor]:
        """The states of `count` sequences after the last token; raises `UnsupportedError` where they do not fit."""
        held = self.held()
        if held.keys() != {each.name for each in shape.tensors} or any(
            held[each.name].shape != (count, *each.dims) or held[each.name].dtype != each.dtype
            for each in shape.tensors
        ):
            told = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in held.items())
            raise UnsupportedError(f"a layer left other states than when the model was opened: {told or 'none'}")
        return [held[each.name] for each in shape.tensors]

    def shape(self) -> StateShape:
        """The shape of one sequence's states."""
        return StateShape(
            tuple(StateTensor(name, tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in self.held().items())
        )
