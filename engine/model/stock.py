"""Drives a model's layers as `transformers` does by default: whole sequences, its own attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from engine.errors import UnsupportedError
from engine.kernels.codec import Codec
from engine.model.build import default_attention
from engine.model.causal_model import CausalModel
from engine.model.experts.interface import stock_experts
from engine.model.padded import CacheView
from engine.model.stock_cache import KeysAndValues, StockView, stock_views
from engine.model.stub import LayerCall


class StockForward:
    """Calls a model's layers, with the parameters that are bound, on sequences of equal length.

    They begin at position 0, or continue the content of a transformers cache. The attention is the one that
    `from_pretrained` uses by default (sdpa or eager); nothing is packed, padded or read from the engine's cache. With a
    codec, keys and values are rounded as in the engine's cache, by a cache of the layers' own.
    """

    def __init__(self, model: CausalModel, codec: Codec | None = None) -> None:
        self._model = model
        self._codec = codec
        config = model.config
        self.attention = str(config._attn_implementation) if model.is_padded else default_attention(model.module)
        """The name of the attention implementation."""

    @property
    def device(self) -> torch.device:
        """The device of the computation."""
        return self._model.device

    @torch.no_grad()
    def record(
        self, ids: torch.Tensor, num_before: int = 0, *, is_cached: bool = False
    ) -> tuple[torch.Tensor, list[LayerCall]]:
        """Embed ids `[sequences, length]`: hidden `[sequences * length, width]`, and how each layer is called.

        num_before: the number of tokens that each sequence continues. is_cached: whether layers give their keys and
        values to a cache; with a codec, or earlier tokens, they do so anyway. The embedding and the outer parameters
        must be bound.
        """
        mask = ids.new_ones(len(ids), num_before + ids.shape[1])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if is_cached or num_before or self._codec is not None:
            view = StockView(self._model.sweeping, self._model.kv_shapes, self._codec, num_before)
            inputs |= {"cache": CacheView(view), "use_cache": True}
        with self.attending():
            return self._model.record(inputs)

    @torch.no_grad()
    def layer(
        self, index: int, hidden: torch.Tensor, call: LayerCall, before: KeysAndValues | None = None
    ) -> tuple[torch.Tensor, KeysAndValues | None]:
        """Run one layer: hidden `[rows, width]` -> `[rows, width]`, and the new keys and values; None without a cache.

        before: the keys and values of the tokens that every sequence continues. Raises `UnsupportedError` for a layer
        with a cache that keeps anything but keys and values.
        """
        views = stock_views(call)
        self._model.sweeping.layer = index
        for view in views:
            view.begin(before)
        with self.attending():
            states = self._model.layer(index, hidden, call)
        if (not views and self._codec is None) or not self._model.kv_shapes[index].width:
            return states, None
        if len(views) != 1 or not views[0].was_given_once:
            raise UnsupportedError(
                f"layer {index} of {type(self._model.module).__name__} does not give its keys and values to a cache of "
                "transformers' once, so that stock attention can neither round them nor continue from them; verify it "
                "without compress-cache and share-prefix"
            )
        new = views[0].new
        views[0].begin(None)
        return states, new

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Inside, the layers attend, and compute experts and norms, by the stock implementations."""
        config, context = self._model.config, self._model.sweeping
        before = config._attn_implementation
        context.is_stock = True
        with stock_experts(self._model.module, self._model.expert_configs):
            if not self._model.is_padded:  # those always attend so
                config._attn_implementation = self.attention
            try:
                yield
            finally:
                context.is_stock = False
                if not self._model.is_padded:
                    config._attn_implementation = before
