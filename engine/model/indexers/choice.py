"""The keys that an indexer chooses for the rows of a micro-batch, computed when attention asks for them."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from engine.model.rows_apart import mapped
from engine.schedule.segment import Segment


class Chooser(Protocol):
    """The interface of a module that chooses keys for rows (`Indexer`)."""

    top_k: int
    score_bytes: int
    dtype: torch.dtype

    def choose(self, given: dict[str, Any], keys: torch.Tensor) -> torch.Tensor:
        """Choose blocks of keys for the rows of one sequence."""

    def mask_of(self, chosen: torch.Tensor, length: int) -> torch.Tensor:
        """The choice as a mask over so many tokens."""


class Choice:
    """A placeholder for the positions that an indexer chooses, where layers pass these to attention or the next layer.

    They are chosen when attention has stored the index keys. What may be passed on is kept.
    """

    def __init__(self, indexer: Chooser, layer: int, given: dict[str, Any], keys: torch.Tensor) -> None:
        """given: the arguments of the indexer's call; keys: the index keys `[rows, dim]` of these rows."""
        self._indexer = indexer
        self.layer = layer
        """The layer whose index keys they are."""
        self.top_k = indexer.top_k
        """The number of keys chosen for each row; all where there are no more."""
        self.score_bytes = indexer.score_bytes
        """The approximate bytes of a row's score of a key while keys are chosen."""
        self.keys = keys
        self._given: dict[str, Any] | None = given
        self._kept: dict[int, torch.Tensor] = {}
        """The chosen blocks int32 `[groups of heads, rows, blocks]` of each segment, by its first row."""

    @property
    def kept_row_bytes(self) -> int:
        """The approximate bytes of a row that are kept for the next layer: positions in 32 bits."""
        return 4 * self.top_k

    def stored(self, dtype: torch.dtype) -> torch.Tensor:
        """The index keys as elements `[rows, index width]` of a cache of `dtype`, without rounding."""
        keys = self.keys if self._is_wider(dtype) else self.keys.to(dtype)
        return keys.contiguous().view(dtype)

    def _is_wider(self, dtype: torch.dtype) -> bool:
        return self._indexer.dtype.itemsize > dtype.itemsize

    def mask(
        self, segment: Segment, first: int, end: int, stored: torch.Tensor | None, *, hands_on: bool
    ) -> torch.Tensor | None:
        """The tokens that rows `first` to `end` of a segment attend to, of those up to the last of the rows.

        stored: index keys `[tokens, index width]` of the sequence, as `stored` returned them; None in a layer that gets
        another layer's choice. hands_on: whether to keep the choice for such a layer. Returns bool `[groups of heads,
        rows, tokens]`, later tokens not excluded, or None where all are chosen.
        """
        length = segment.span.start + segment.past + end
        if length <= self.top_k:
            return None
        if stored is None:
            chosen = self._kept[segment.first][:, first:end]
        else:
            assert self._given is not None
            rows = slice(segment.first + first, segment.first + end)
            keys = stored[:length].contiguous()
            keys = keys.view(self._indexer.dtype) if self._is_wider(keys.dtype) else keys
            chosen = self._indexer.choose(mapped(lambda each: each[:, rows], self._given), keys)
            if hands_on:
                self._place(segment, chosen)[:, first:end] = chosen
        return self._indexer.mask_of(chosen, length)

    def _place(self, segment: Segment, like: torch.Tensor) -> torch.Tensor:
        """The storage of the blocks chosen for a segment's rows; rows that attend to all get the first blocks."""
        if segment.first not in self._kept:
            first_ones = torch.arange(like.shape[-1], dtype=torch.int32, device=like.device)
            self._kept[segment.first] = first_ones.repeat(like.shape[0], segment.num_rows, 1)
        return self._kept[segment.first]

    def forget_rows(self) -> None:
        """Release the arguments of the indexer's call, once attention is computed; the choice stays."""
        self._given = None
        self.keys = self.keys.new_empty(0, *self.keys.shape[1:])  # a view would keep all of it
