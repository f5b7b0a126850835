"""A model's layers driven as `transformers` drives them by default: whole sequences, its own attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from engine.cache.key_value import pack
from engine.cache.shape import KVShape
from engine.errors import UnsupportedError
from engine.kernels.codec import Codec
from engine.model.build import default_attention
from engine.model.causal_model import CausalModel
from engine.model.padded import CacheView, ProbingView
from engine.model.stub import LayerCall


class StockForward:
    """Calls a model's layers, with the parameters that are bound, on sequences of equal length that begin at 0.

    The attention is what `from_pretrained` takes by default (sdpa or eager); nothing is packed, padded, shared between
    sequences or read from the engine's cache. With a codec, keys and values are rounded as the engine's cache rounds
    them, by a cache of the layers' own that hands them back.
    """

    def __init__(self, model: CausalModel, codec: Codec | None = None) -> None:
        self._model = model
        self._codec = codec
        config = model.config
        self.attention = str(config._attn_implementation) if model.is_padded else default_attention(config, model.dtype)
        """The name of the attention implementation."""
        self._rounding: _RoundingView | None = None

    @torch.no_grad()
    def record(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[LayerCall]]:
        """Embed ids `[sequences, length]`: hidden `[sequences * length, width]`, and how each layer is called.

        Needs the embedding and the outer parameters bound.
        """
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        if self._codec is not None:
            view = _RoundingView(self._model, self._codec)
            inputs |= {"cache": CacheView(view), "use_cache": True}
        with self._attending():
            return self._model.record(inputs)

    @torch.no_grad()
    def layer(self, index: int, hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Run one layer: hidden `[rows, width]` -> `[rows, width]`.

        Raises `UnsupportedError` for a layer that keeps something else than what it attends to, with a codec.
        """
        views = [view for value in (*call.args, *call.kwargs.values()) if (view := _view_of(value)) is not None]
        self._model.sweeping.layer = index
        for view in views:
            view.num_updates = 0
        with self._attending():
            states = self._model.layer(index, hidden, call)
        if self._codec is not None and [view.num_updates for view in views] != [1]:
            raise UnsupportedError(
                f"compress-cache: layer {index} of {type(self._model.module).__name__} does not give its keys and "
                "values to a cache of transformers' once, so that stock attention cannot round them; verify it without"
            )
        return states

    @contextmanager
    def _attending(self) -> Iterator[None]:
        """Inside, the layers attend by the stock implementation."""
        if self._model.is_padded:  # they always do
            yield
            return
        config = self._model.config
        before = config._attn_implementation
        config._attn_implementation = self.attention
        try:
            yield
        finally:
            config._attn_implementation = before


def _view_of(value: Any) -> _RoundingView | None:
    view = value.view if isinstance(value, CacheView) else None
    return view if isinstance(view, _RoundingView) else None


class _RoundingView(ProbingView):
    """What layers take for an empty cache: gives keys and values back as the engine's cache would."""

    def __init__(self, model: CausalModel, codec: Codec) -> None:
        super().__init__(model.sweeping, 0)
        self._model = model
        self._codec = codec
        self.num_updates = 0
        """Since the layer in hand was called."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[sequences, heads, length, dim]`, rounded."""
        count, heads, length, dim = key_states.shape
        shape = self._model.kv_shapes[self._sweeping.layer]
        if KVShape(heads, dim, value_states.shape[1], value_states.shape[3]) == shape:
            self.num_updates += 1
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
        """Length and offset of the keys: the new ones."""
        return int(query_length), 0

    def get_seq_length(self) -> int:
        """Nothing is before the new rows."""
        return 0
