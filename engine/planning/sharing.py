"""How the engines of one machine share the weights of a model (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.memory.tiers import Memory
from engine.planning.model_shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How many engines run the same model, each on a device of its own, and whose weights are whose."""

    count: int = 1
    gather: bool = False
    """Each has a part of every layer, and they are put together layer by layer; else each has all weights."""
    stages: bool = False
    """Each has some of the layers; a shape is that of the largest stage then."""

    @property
    def has_own(self) -> bool:
        """Whether each has bytes of weights that no other one has in memory."""
        return self.gather or self.stages

    @property
    def num_lanes(self) -> int:
        """Sweeps in flight, each of sequences of its own and with a part of the KV cache: one at every stage."""
        return self.count if self.stages else 1

    @property
    def num_handed_on(self) -> int:
        """Sweeps whose hidden states a stage may keep for the next one, which has not taken them."""
        return self.count if self.stages else 0


ALONE = Sharing()


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a run may use of a machine under a policy."""

    memory: Memory
    """`device` of each device (the least of all), `host` and `disk` of all together."""
    sharing: Sharing = ALONE
    """How many devices there are; whether they gather where nothing is known of their rates."""


class WeightBytes:
    """What percents of the weights take where engines share them.

    The token embedding and what is needed throughout stay whole with every engine; of the rest each has a part where
    it is gathered. Where each has all, what lies in host memory lies there once. Of stages each has its own.
    """

    def __init__(self, shape: ModelShape, sharing: Sharing) -> None:
        is_tied = shape.embedding_bytes == 0
        gathered = sum(shape.unit_bytes[:-1] if is_tied else shape.unit_bytes) if sharing.gather else 0
        self._sharing = sharing
        self._all = shape.weight_bytes * (sharing.count if sharing.stages else 1)
        self._own = shape.weight_bytes - gathered * (sharing.count - 1) / sharing.count
        """Of one engine's own, all of it resident."""

    def of_one(self, percent: float) -> int:
        """Bytes of one engine's own."""
        return round(self._own * percent / 100)

    def on_host(self, percent: float) -> int:
        """Bytes in host memory, of all engines together."""
        return self.on_disk(percent) if self._sharing.has_own else round(self._all * percent / 100)

    def on_disk(self, percent: float) -> int:
        """Bytes on disk, of all engines together."""
        return round(self._own * percent / 100) * self._sharing.count
