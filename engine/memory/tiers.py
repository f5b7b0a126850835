"""The three tiers of memory, the bytes that a run may use of each, and the percents of a share by tier (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.policy import Share

Tier = Literal["device", "host", "disk"]


TIERS: tuple[Tier, ...] = ("device", "host", "disk")


def percents(share: Share) -> dict[Tier, float]:
    """The percents of a share by tier."""
    return {"device": share.gpu, "host": share.cpu, "disk": share.disk}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The bytes that a run may use on each tier."""

    device: int
    host: int
    disk: int
    shared: bool = False
    """Whether device and host tier are the same memory (on the CPU): both together may use `host`."""
