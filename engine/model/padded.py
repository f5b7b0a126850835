"""Padded micro-batches, for families with their own attention: they get a cache that is a view of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from engine.batch.rows import Rows
from engine.cache.shape import KVShape
from engine.errors import UnsupportedError
from engine.memory import accelerator
from engine.schedule.segment import Segment

if TYPE_CHECKING:
    from engine.model.sweep_context import SweepContext


class PaddedBatch(Rows):
    """Rows of `segments` as a rectangle `[segments, rows]`, each aligned to its right edge.

    Keys are assembled per sequence, aligned to the right edge, too, without gaps: whatever a family derives from its
    attention mask (ALiBi's distances, for one) comes out as for a single sequence.
    """

    def __init__(
        self, segments: list[Segment], device: torch.device, sweeping: SweepContext, most_states: int = 0
    ) -> None:
        super().__init__(segments, device, most_states)
        self.num_columns = self.num_rows // len(segments)
        reach = max(segment.span.start + segment.past + segment.num_rows for segment in segments)
        self.num_keys = max(reach, self.num_columns)
        ids = torch.zeros(len(segments), self.num_columns, dtype=torch.long)
        positions = torch.zeros(len(segments), self.num_columns, dtype=torch.long)
        mask = torch.zeros(len(segments), self.num_keys, dtype=torch.long)
        for index, segment in enumerate(segments):
            span, last = segment.span, segment.past + segment.num_rows
            ids[index, -segment.num_rows :] = torch.tensor(segment.tokens)
            positions[index, -segment.num_rows :] = torch.arange(span.start + segment.past, span.start + last)
            mask[index, -(span.start + last) :] = 1
        self.ids = ids
        """The token ids `[segments, rows]`, on the host."""
        self._positions = accelerator.sent(positions, device)
        self._mask = accelerator.sent(mask, device)
        self._sweeping = sweeping

    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of the model's forward."""
        return {
            "input_ids": accelerator.sent(self.ids, self._mask.device),
            "position_ids": self._positions,
            "attention_mask": self._mask,
            "cache": CacheView(_LayerView(self._sweeping, self)),
            "use_cache": True,
        }

    def assemble(
        self, layer: int, sweeping: SweepContext, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of each sequence `[segments, heads, keys, dim]` from the cache and the new rows.

        They are contiguous, like those of transformers' own cache: some families view them as other shapes.
        """
        cache, count = sweeping.cache, len(self.segments)
        keys = key.new_zeros(count, key.shape[1], self.num_keys, key.shape[2])
        values = value.new_zeros(count, value.shape[1], self.num_keys, value.shape[2])

        def put(index: int, end: int, piece: tuple[torch.Tensor, torch.Tensor]) -> int:
            first = end - piece[0].shape[1]
            keys[index, :, first:end], values[index, :, first:end] = piece
            return first

        for index, segment in enumerate(self.segments):
            new = slice(segment.first, segment.first + segment.num_rows)
            end = put(index, self.num_keys, (key[new].transpose(0, 1), value[new].transpose(0, 1)))
            if segment.past:
                end = put(index, end, cache.unpack(layer, cache.read(layer, segment.span, segment.past)))
            for prefix in reversed(segment.span.chain):
                end = put(index, end, cache.unpack(layer, cache.read(layer, prefix, len(prefix.tokens))))
        return keys, values


_STATE = "it keeps a state in addition to keys and values, which this cache does not have"


class _NotKeptError(UnsupportedError, AttributeError):
    """Raised when a layer asks its cache for more than keys and values; `hasattr` answers no."""


class _KeysAndValues(CacheLayerMixin):
    """A layer's cache that refuses everything but keys and values."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise _NotKeptError(f"its layers keep more than keys and values (they ask their cache for {name})")


class _LayerView(_KeysAndValues):
    """One layer of a micro-batch's cache."""

    def __init__(self, sweeping: SweepContext, batch: PaddedBatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sweeping = sweeping
        self._batch = batch

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the rows are the KV cache's."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys, values `[segments, heads, rows, dim]`; return all of each sequence, `[…, keys, dim]`."""
        sweeping = self._sweeping
        key, value = (x.transpose(1, 2).flatten(0, 1) for x in (key_states, value_states))
        key, value = sweeping.cache.write(sweeping.layer, self._batch, key, value)
        return self._batch.assemble(sweeping.layer, sweeping, key, value)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The length and offset of the keys."""
        return self._batch.num_keys, 0

    def get_seq_length(self) -> int:
        """The number of keys before the new rows."""
        return self._batch.num_keys - self._batch.num_columns

    def get_max_length(self) -> int:
        """There is no limit."""
        return -1


class _EveryLayer(list[Any]):
    """A list that returns the one view, whatever layer is asked for."""

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(0)


class CacheView(Cache):
    """The KV cache of a model that runs a padded micro-batch."""

    def __init__(self, view: CacheLayerMixin) -> None:
        super().__init__(layers=_EveryLayer([view]))
        self.view = view
        """The view of the current layer."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every layer is the same view: the executor sets the current one."""
        return self.view.update(key_states, value_states, *args, **kwargs)

    def update_indexer(self, *_: Any, **__: Any) -> Any:
        """Refuse index keys, as of DeepSeek-V3.2."""
        raise UnsupportedError("it keeps an index of its keys in addition to keys and values")

    def get_conv_state(self, *_: Any, **__: Any) -> Any:
        """Refuse a state: a module that needs one gets another cache."""
        raise UnsupportedError(_STATE)

    def update_conv_state(self, *_: Any, **__: Any) -> Any:
        """Refuse a state: a module that needs one gets another cache."""
        raise UnsupportedError(_STATE)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of keys before the new rows."""
        return self.view.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The length and offset of the keys."""
        return self.view.get_mask_sizes(query_length)


class ProbingView(_KeysAndValues):
    """Stands in for a layer's cache while shapes are probed; it holds nothing."""

    def __init__(self, sweeping: SweepContext, num_keys: int = 1, num_rows: int = 1) -> None:
        """num_keys: the number of keys, those of the new rows included."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._sweeping = sweeping
        self._num_keys = num_keys
        self._num_rows = num_rows

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Note the shapes of keys, values `[1, heads, 1, dim]`, and return them."""
        if self._sweeping.is_checking:
            self._sweeping.attended += 1
        else:
            self._sweeping.note(
                KVShape(key_states.shape[1], key_states.shape[3], value_states.shape[1], value_states.shape[3])
            )
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The length and offset of the keys."""
        return self._num_keys, 0

    def get_seq_length(self) -> int:
        """The number of keys before the new rows."""
        return self._num_keys - self._num_rows

    def get_max_length(self) -> int:
        """There is no limit."""
        return -1
