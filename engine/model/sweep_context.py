"""What the code inside a model's layers needs to know of the sweep that calls them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.errors import UnsupportedError

if TYPE_CHECKING:
    from engine.batch.rows import Rows
    from engine.cache.key_value import KVCache
    from engine.cache.shape import KVShape


@dataclass
class SweepContext:
    """What the attention function needs to know of the sweep in hand; the executor sets it before each layer call."""

    layer: int = 0
    probed: KVShape | None = None
    """Found out by `probe_kv_shape` since the layer in hand was called."""
    is_plain: bool = True
    """Whether no layer that was probed has caps, sinks or a window."""
    batch: Rows = field(init=False)
    cache: KVCache = field(init=False)

    def note(self, shape: KVShape) -> None:
        """Keep what the layer in hand has shown; raises `UnsupportedError` the second time."""
        if self.probed is not None:
            raise UnsupportedError("its layers attend more than once")
        self.probed = shape
