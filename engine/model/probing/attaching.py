"""Wraps the modules that keep states, and the indexers, once each kind of them has been tried."""

from __future__ import annotations

from typing import Any

from torch import nn

from engine.cache.state_shape import StateShape
from engine.model.drivable import Drivable
from engine.model.indexers.trial import try_choice
from engine.model.mixers.mixer import Mixer
from engine.model.mixers.reference_code import reference_code
from engine.model.mixers.trial import try_out
from engine.model.mixers.work import work_row_bytes
from engine.model.undrivable import UndrivableError


def attach_mixers(model: Drivable) -> None:
    """Have the modules that keep states called for one group of sequences after another, once each kind was tried."""
    tried: dict[tuple[type[nn.Module], StateShape], Mixer] = {}
    for index, mixer in model.mixers.items():
        first = tried.setdefault((type(mixer.module), mixer.shape), mixer)
        if first is mixer:
            with reference_code():
                mixer.work_row_bytes = work_row_bytes(mixer)
                try_out(mixer, model.layers[index])
        mixer.continues, mixer.work_row_bytes = first.continues, first.work_row_bytes
    for mixer in model.mixers.values():
        mixer.attach()


def attach_indexers(model: Drivable, is_batch_invariant: bool) -> None:
    """Have the modules that choose keys called for the rows of one sequence at a time, once each kind was tried."""
    if model.indexers and is_batch_invariant:
        raise UndrivableError(
            "batch-invariant: it chooses keys by an index, whose scores are sums over other shapes in another batch; "
            "leave batch-invariant out"
        )
    model.sweeping.hands_masks = any(indexer.wants_masks for indexer in model.indexers.values())
    tried = set[tuple[Any, ...]]()
    for index, indexer in model.indexers.items():
        kind = type(indexer.module), indexer.dim, indexer.top_k
        if kind not in tried:
            tried.add(kind)
            try_choice(indexer, model.layers[index])
    if model.indexers and not any(0 < index not in model.indexers for index in range(len(model.layers))):
        model.sweeping.handed_row_bytes = 0  # every layer chooses for itself, and takes nothing of what is handed on
    for indexer in model.indexers.values():
        indexer.attach()
