"""A module of a layer that keeps a recurrent state of each sequence, called for one group of sequences at a time."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import nn

from engine.batch.state_group import StateGroup
from engine.cache.state_shape import StateShape
from engine.model.mixers.call import Call
from engine.model.mixers.states import States, StatesCache
from engine.model.rows_apart import mapped, row_product
from engine.model.sweep_context import SweepContext


class Mixer:
    """Wraps a stock module that asks a cache of transformers' for states, and gives it one for each call.

    The rows of a micro-batch are cut into groups, `[sequences, rows, …]` without padding; rows of padding get zeros.
    Calls of stock layers reach the module directly, with no cache.
    """

    def __init__(
        self,
        module: nn.Module,
        call: Call,
        context: SweepContext,
        shape: StateShape,
        num_states: int,
        given: dict[str, Any],
        output: Any,
    ) -> None:
        """call: of the module's own forward; num_states: the most states of a kind; given, output: without numbers."""
        self.module, self.shape, self.given = module, shape, given
        self._context, self._num_states, self._output = context, num_states, output
        self._call = call
        self.continues = False
        """Whether it can process several tokens from a state."""
        self.work_row_bytes = 0
        """The bytes of its temporary tensors per row of a prompt, as far as they are known."""

    @property
    def kind(self) -> str:
        """The name of the module's class."""
        return type(self.module).__name__

    def attach(self) -> None:
        """From now on, calls of the module go through this wrapper."""
        self.module.__dict__["forward"] = self._forward

    def new_states(self) -> States:
        """The states of sequences that begin."""
        return States(self._num_states)

    def on(self, given: dict[str, Any], states: States) -> Any:
        """The module's result for sequences that continue `states`, which are updated in place."""
        return without_states(self._call.on(given, StatesCache(states)), states)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        context, call = self._context, self._call
        given = call.named(args, kwargs)
        if context.is_stock:
            return call.on(given, None)
        lead = call.lead(given)
        if context.is_checking:
            return self._rows_apart(next(iter(given.values())))
        whole: Any = None
        for group in context.batch.state_groups:
            states = self.new_states()
            before = context.states.begin(context.layer, group)
            if before is not None:
                states.begin(self.shape, before)
            with context.left_out():
                found = self.on({name: _rows_of(value, lead, group) for name, value in given.items()}, states)
            context.states.write(context.layer, group, states.taken(self.shape, group.count))
            whole = _with(whole, found, lead, group)
        return whole

    def _rows_apart(self, hidden: Any) -> Any:
        """A stand-in result, in the form of the module's, in which rows do not interact."""

        def instead(like: torch.Tensor) -> torch.Tensor:
            rows: torch.Tensor = row_product(hidden, prod(like.shape[2:])).unflatten(-1, like.shape[2:])
            return rows

        return mapped(instead, self._output)


def without_states(output: Any, states: States) -> Any:
    """The module's result without the states that it also returned; their places are empty."""
    if isinstance(output, torch.Tensor):
        return None if any(output is state for state in states.held().values()) else output
    return type(output)(without_states(x, states) for x in output) if type(output) in (tuple, list) else output


def _rows_of(value: Any, lead: tuple[int, int], group: StateGroup) -> Any:
    """The group's part `[segments, rows]` of an argument for `[sequences, rows]` of a micro-batch."""

    def taken(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.expand(*lead, *rows.shape[2:]).flatten(0, 1)
        rows = rows if group.index is None else rows.index_select(0, group.index)
        found: torch.Tensor = rows.unflatten(0, (group.count, group.length))
        return found

    return mapped(taken, value)


def _with(whole: Any, found: Any, lead: tuple[int, int], group: StateGroup) -> Any:
    """The rows of a micro-batch, updated with the results of a group."""
    if isinstance(found, torch.Tensor):
        rows = found.flatten(0, 1)
        if group.index is None:
            return rows.unflatten(0, lead)
        if whole is None:
            whole = rows.new_zeros(*lead, *rows.shape[1:])
        whole.view(-1, *rows.shape[1:]).index_copy_(0, group.index, rows)
        return whole
    if type(found) in (tuple, list):
        before = [None] * len(found) if whole is None else whole
        return type(found)(_with(*each, lead, group) for each in zip(before, found, strict=True))
    return found
