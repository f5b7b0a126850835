"""Checks whether stock layers compute the same for tokens after a cache as for the whole sequence."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from engine.model.attention.probe import call_on_meta
from engine.model.causal_model import CausalModel
from engine.model.family_probe import one_of_each_kind
from engine.model.padded import CacheView
from engine.model.stock import StockForward
from engine.model.stock_cache import stock_views
from engine.model.stub import LayerCall

_PARTS = 3
"""The parts of a sequence: a first one, one after it, and one after both."""
_SHORTEST = 2 * _PARTS
"""A part of fewer tokens has no mask."""


@torch.no_grad()
def can_continue(model: CausalModel, stock: StockForward, length: int) -> bool:
    """Whether sequences of up to `length` tokens may be computed in parts, each from the earlier keys and values.

    The model's own forward must embed the parts, and call its layers on them, as it does on the whole: with the same
    positions, rotary tables and biases, and the same visible part of the mask. Rotary tables that depend on a
    sequence's length are not the same. Every layer must give its keys and values to the cache, once; none may keep a
    state, or choose keys by an index. The outer parameters must be bound.
    """
    if length < _SHORTEST or model.mixers or model.indexers:
        return False
    borders = [length * part // _PARTS for part in range(_PARTS + 1)]
    width = model.state[model.embedding_name].shape[1]
    ids = torch.zeros(1, length, dtype=torch.long, device=model.device)

    def record(first: int, end: int) -> tuple[torch.Tensor, list[LayerCall]]:
        zeros = torch.zeros(1, end - first, width, dtype=model.dtype, device=model.device)
        with model.embedding_as(lambda _: zeros):  # what it is called with may be of other ids, looked up before
            return stock.record(ids[:, first:end], first, is_cached=True)

    try:
        parts = [record(first, end) for first, end in pairwise(borders)]
        hidden, calls = record(0, length)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a family makes of a cache that it does not expect
        return False
    for (first, end), (embedded, called) in zip(pairwise(borders), parts, strict=True):
        if not torch.equal(embedded, hidden[first:end]):
            return False
        comparison = _Comparison(first, end)
        if not all(comparison.is_part(call, whole) for call, whole in zip(called, calls, strict=True)):
            return False
    return all(_gives_keys_once(model, stock, index, parts[-1][1][index]) for index in one_of_each_kind(model))


class _Comparison:
    """Compares the arguments of a layer for tokens `first` to `end` of a sequence with those for the whole."""

    def __init__(self, first: int, end: int) -> None:
        self._first, self._end = first, end
        self._known: dict[tuple[int, int], bool] = {}
        """Results for compared tensors, by their identity: most layers get the same ones."""

    def is_part(self, part: LayerCall, whole: LayerCall) -> bool:
        """Whether the layer would compute the same rows with both."""
        if not self._is_same((part.args, part.kwargs), (whole.args, whole.kwargs)):
            return False
        rows = self._end - self._first
        # Without a mask, attention takes the first of its rows for the first of all tokens.
        return self._first == 0 or any(
            isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[-2:] == (rows, self._end)
            for value in (*part.args, *part.kwargs.values())
        )

    def _is_same(self, part: Any, whole: Any) -> bool:
        if isinstance(part, torch.Tensor) or isinstance(whole, torch.Tensor):
            key = id(part), id(whole)
            if key not in self._known:
                self._known[key] = self._is_same_tensor(part, whole)
            return self._known[key]
        if isinstance(part, CacheView):
            return isinstance(whole, CacheView)
        if type(part) is not type(whole):
            return False
        if isinstance(part, tuple | list):
            return len(part) == len(whole) and all(self._is_same(*pair) for pair in zip(part, whole, strict=True))
        if isinstance(part, dict):
            return part.keys() == whole.keys() and all(self._is_same(part[key], whole[key]) for key in part)
        return bool(part == whole)

    def _is_same_tensor(self, part: torch.Tensor | None, whole: torch.Tensor | None) -> bool:
        if part is not None and whole is not None:
            expected = self._part_of(whole, part.shape)
            return expected is not None and torch.equal(part, expected)
        # A mask that is left out hides what comes later, and nothing else.
        if part is None:
            rows = self._end - self._first
            given = None if whole is None else self._part_of(whole, (*whole.shape[:-2], rows, self._end))
            if self._first > 0:  # attention would take the first row for the first of all tokens
                return False
        else:
            given = part
        if given is None or given.ndim != 4:
            return False
        shown = given if given.dtype == torch.bool else given == 0
        row, column = (
            torch.arange(*border, device=shown.device) for border in ((self._first, self._end), (self._end,))
        )
        causal = column[None, :] <= row[:, None]
        return shown.shape[-2:] == causal.shape and torch.equal(shown, causal.expand(shown.shape))

    def _part_of(self, whole: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor | None:
        """The part of a whole sequence's tensor for these rows, and for the keys that they see."""
        if whole.ndim != len(shape):
            return None
        for dim, size in enumerate(shape):
            if size == whole.shape[dim]:
                continue
            first = {self._end: 0, self._end - self._first: self._first}.get(size)
            if first is None or first + size > whole.shape[dim]:
                return None
            whole = whole.narrow(dim, first, size)
        return whole


def _gives_keys_once(model: CausalModel, stock: StockForward, index: int, call: LayerCall) -> bool:
    """Whether a layer gives its keys and values to its cache once, found without numbers."""
    (view,) = stock_views(call) or (None,)
    if view is None:
        return False
    shape, num_before = model.kv_shapes[index], view.get_seq_length()
    view.begin(
        (
            torch.zeros(1, shape.key_heads, num_before, shape.key_dim, dtype=model.dtype, device="meta"),
            torch.zeros(1, shape.value_heads, num_before, shape.value_dim, dtype=model.dtype, device="meta"),
        )
    )
    rows = torch.zeros(call.shape[0] * call.shape[1], model.hidden_size, dtype=model.dtype, device="meta")
    model.sweeping.layer = index
    unit = next(unit for unit in model.units if unit.name == f"layer.{index}")
    with stock.attending(), unit.holding(model.state):
        try:
            call_on_meta(model.layers[index], call.laid_out(rows), call.args, call.kwargs)
        except Exception as error:  # what comes after its attention may need numbers
            if isinstance(error, torch.OutOfMemoryError):
                raise
    return view.was_given_once
