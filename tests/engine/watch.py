"""Looks on while an engine works: the rows that its first layer really computes, and its cache at that moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from engine import Engine
from engine.kv_cache import KVCache


class Watch:
    """Notes, sweep by sweep, what reaches the first layer of an engine's model."""

    def __init__(self, engine: Engine, look: Callable[[], Any] = lambda: None) -> None:
        self.batches: dict[int, list[int]] = {}
        """Rows (padding included) of each micro-batch, by the number of the sweep."""
        self.seen: list[Any] = []
        """What `look` returned for each micro-batch."""

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.batches.setdefault(engine.num_sweeps, []).append(args[0].shape[1])
            self.seen.append(look())

        engine._model.layers[0].register_forward_pre_hook(note)

    @property
    def rows(self) -> list[int]:
        """Rows of each sweep."""
        return [sum(sizes) for sizes in self.batches.values()]


def cache_of(engine: Engine) -> KVCache:
    """The engine's KV cache."""
    return engine._executor._cache
