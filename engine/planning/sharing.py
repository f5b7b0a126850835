"""How the engines of one machine share the weights of a model (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.memory.tiers import Memory
from engine.planning.model_shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """The number of engines that run the same model, each on its own device, and how they share its weights."""

    count: int = 1
    gather: bool = False
    """Whether each has a part of every layer, which are gathered layer by layer; otherwise each has all weights."""
    stages: bool = False
    """Whether each has some of the layers; the model shape is then that of the largest stage."""

    @property
    def has_own(self) -> bool:
        """Whether each stores weights that no other engine has in memory."""
        return self.gather or self.stages

    @property
    def num_lanes(self) -> int:
        """The number of sweeps in flight, one per stage, each with its own sequences and part of the KV cache."""
        return self.count if self.stages else 1

    @property
    def num_handed_on(self) -> int:
        """The number of sweeps whose hidden states a stage may keep until the next stage takes them."""
        return self.count if self.stages else 0


ALONE = Sharing()


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The resources of a machine that a run may use under a policy."""

    memory: Memory
    """`device` of each device (the smallest), `host` and `disk` of all together."""
    sharing: Sharing = ALONE
    """The number of devices; and whether they gather if their rates are unknown."""


class WeightBytes:
    """The bytes of percents of the weights where engines share them.

    The token embedding and the parameters that are needed throughout stay whole with every engine; of the rest each has
    a part where it is gathered. Where each has all, the weights in host memory are stored once. Stages have their own.
    """

    def __init__(self, shape: ModelShape, sharing: Sharing) -> None:
        is_tied = shape.embedding_bytes == 0
        gathered = sum(shape.unit_bytes[:-1] if is_tied else shape.unit_bytes) if sharing.gather else 0
        self._sharing = sharing
        self._all = shape.weight_bytes * (sharing.count if sharing.stages else 1)
        self._own = shape.weight_bytes - gathered * (sharing.count - 1) / sharing.count
        """The bytes of one engine's own weights, if all are resident."""

    def of_one(self, percent: float) -> int:
        """The bytes of one engine's own weights."""
        return round(self._own * percent / 100)

    def on_host(self, percent: float) -> int:
        """The bytes in host memory, of all engines together."""
        return self.on_disk(percent) if self._sharing.has_own else round(self._all * percent / 100)

    def on_disk(self, percent: float) -> int:
        """The bytes on disk, of all engines together."""
        return round(self._own * percent / 100) * self._sharing.count
