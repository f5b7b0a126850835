"""The interface of attention implementations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from engine.batch.micro_batch import MicroBatch
from engine.cache.key_value import KVCache
from engine.model.attention.rule import AttentionRule

if TYPE_CHECKING:
    from engine.model.indexers.choice import Choice


@dataclass(frozen=True)
class Attending:
    """One layer's attention over a packed micro-batch: [prefix | own past | new] for the rows of each span."""

    batch: MicroBatch
    query: torch.Tensor
    """The rotated queries, `[rows, heads, dim]`."""
    key: torch.Tensor
    """The keys of the new rows as the cache will return them: `[rows, KV heads, dim]`."""
    value: torch.Tensor
    """The values of the new rows, `[rows, KV heads, value dim]`."""
    cache: KVCache
    layer: int
    rule: AttentionRule
    is_batch_invariant: bool = False
    """Whether a row's result must have the same bits whatever the rest of the batch."""
    choice: Choice | None = None
    """The keys that each row attends to; None: all in reach."""
    hands_on: bool = False
    """Whether the next layer may attend to the keys that are chosen here."""
    index: torch.Tensor | None = None
    """The index keys of the new rows as the cache will return them: `[rows, index width]`."""

    def new(self, rows: slice) -> list[torch.Tensor]:
        """What the cache stores of some of the new rows."""
        return [each[rows] for each in (self.key, self.value, self.index) if each is not None]

    @cached_property
    def groups(self) -> int:
        """The number of query heads that share a head of keys and values."""
        return self.query.shape[1] // self.key.shape[1]


class AttentionBackend(ABC):
    """An attention implementation; decode steps are the first rows of a micro-batch, new spans the others."""

    @abstractmethod
    def can(self, asked: Attending) -> bool:
        """Whether it supports this layer's rule, on this device, for these sizes."""

    @abstractmethod
    def prefill(self, asked: Attending) -> torch.Tensor:
        """The result for the rows of new spans, `[rows, heads, value dim]`."""

    @abstractmethod
    def decode(self, asked: Attending) -> torch.Tensor:
        """The result for the rows of decode steps, `[rows, heads, value dim]`."""
