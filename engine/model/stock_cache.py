"""A transformers cache for stock layers, which holds the tokens before those that the layers are called with."""

from __future__ import annotations

from typing import Any

import torch

from engine.cache.key_value import pack
from engine.cache.shape import KVShape
from engine.kernels.codec import Codec
from engine.model.padded import CacheView, ProbingView
from engine.model.stub import LayerCall
from engine.model.sweep_context import SweepContext

KeysAndValues = tuple[torch.Tensor, torch.Tensor]
"""The keys and values of one layer, each `[sequences, heads, tokens, dim]`."""


class StockView(ProbingView):
    """A layer's cache of `num_before` tokens: it returns their keys and values in front of the new ones.

    With a codec, new ones are rounded as in the engine's cache.
    """

    def __init__(
        self, sweeping: SweepContext, shapes: list[KVShape], codec: Codec | None = None, num_before: int = 0
    ) -> None:
        super().__init__(sweeping)
        self._shapes = shapes
        self._codec = codec
        self._num_before = num_before
        self.begin(None)

    def begin(self, before: KeysAndValues | None) -> None:
        """Become the cache of the next layer; before: `[1, heads, num_before, dim]` each, None where there are none."""
        self._before = before
        self.new: KeysAndValues | None = None
        """The keys and values that the layer stored last, rounded."""
        self._given: list[KVShape] = []

    @property
    def was_given_once(self) -> bool:
        """Whether the layer stored keys and values once, in the expected shape."""
        return self._given == [self._shapes[self._sweeping.layer]]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> KeysAndValues:
        """Store new keys and values `[sequences, heads, length, dim]`; return all, `[…, num_before + length, dim]`."""
        self._given.append(
            KVShape(key_states.shape[1], key_states.shape[3], value_states.shape[1], value_states.shape[3])
        )
        self.new = key, value = self._rounded(key_states, value_states)
        if self._before is None:
            return key, value
        keys, values = (x.to(key.device).expand(len(key), -1, -1, -1) for x in self._before)
        return torch.cat((keys, key), dim=2), torch.cat((values, value), dim=2)

    def _rounded(self, key_states: torch.Tensor, value_states: torch.Tensor) -> KeysAndValues:
        if self._codec is None or key_states.is_meta:
            return key_states, value_states
        count, heads, length, dim = key_states.shape
        rows = pack(*(x.transpose(1, 2).flatten(0, 1) for x in (key_states, value_states)))
        rows = self._codec.decode_rows(self._codec.encode_rows(rows), rows.shape[1], rows.dtype)
        keys, values = rows.split((heads * dim, rows.shape[1] - heads * dim), dim=-1)
        shaped = (
            x.view(count, length, like.shape[1], like.shape[3]).transpose(1, 2).contiguous()
            for x, like in ((keys.contiguous(), key_states), (values.contiguous(), value_states))
        )
        key, value = shaped
        return key, value

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The length and offset of all keys."""
        return self._num_before + int(query_length), 0

    def get_seq_length(self) -> int:
        """The number of keys before the new ones."""
        return self._num_before


def stock_views(call: LayerCall) -> list[StockView]:
    """The caches that a layer is called with."""
    caches = [value.view for value in (*call.args, *call.kwargs.values()) if isinstance(value, CacheView)]
    return [view for view in caches if isinstance(view, StockView)]
