"""What fills a store: a described checkpoint, or its encoded weights where they were kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from engine.checkpoint.description import ModelDescription
from engine.policy import Policy
from engine.weights.encoded.kept import KeptWeights
from engine.weights.loading import load_checkpoint
from engine.weights.store import WeightStore

Fill = Callable[[WeightStore], Iterator[None]]
"""Checks that weights fit a store, and returns an iterator that puts a parameter in place at each step."""


def fill_from(description: ModelDescription, policy: Policy, *, with_digest: bool = True) -> Fill:
    """What fills a store from the described checkpoint, or from its encoded weights where they were kept.

    with_digest: whether all of the weight files is read, for their digest.
    """
    path, codes = Path(description.path), policy.compress_weight

    def fill(store: WeightStore) -> Iterator[None]:
        kept = KeptWeights(path, store, codes) if codes and store.has_codes else None
        return load_checkpoint(path, store, kept, with_digest=with_digest)

    return fill
