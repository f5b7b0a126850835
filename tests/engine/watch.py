"""Looks on while an engine works: the rows that its first layer really computes, and its cache at that moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from engine import Engine
from engine.cache.key_value import KVCache
from engine.executor import Answer
from engine.schedule.segment import Segment


class Watch:
    """Notes, sweep by sweep, what reaches the first layer of an engine's model."""

    def __init__(self, engine: Engine, look: Callable[[], Any] = lambda: None) -> None:
        self.batches: dict[int, list[int]] = {}
        """Rows (padding included) of each micro-batch, by the number of the sweep."""
        self.seen: list[Any] = []
        """What `look` returned for each micro-batch."""
        self.tokens: list[int] = []
        """Rows of each sweep without padding."""

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.batches.setdefault(engine.num_sweeps, []).append(args[0].shape[:2].numel())
            self.seen.append(look())

        def sweep(batches: list[list[Segment]]) -> list[Answer]:
            self.tokens.append(sum(segment.num_rows for batch in batches for segment in batch))
            return run(batches)

        run = engine.parts.lanes[0].executor.sweep
        engine.parts.lanes[0].executor.sweep = sweep  # type: ignore[method-assign]
        engine.parts.model.layers[0].register_forward_pre_hook(note)

    @property
    def rows(self) -> list[int]:
        """Rows of each sweep."""
        return [sum(sizes) for sizes in self.batches.values()]


def cache_of(engine: Engine) -> KVCache:
    """The engine's KV cache."""
    return engine.parts.lanes[0].executor._cache
