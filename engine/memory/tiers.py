"""The three tiers of memory, and the percents of a share by tier (pure)."""

from __future__ import annotations

from typing import Literal

from engine.policy import Share

Tier = Literal["device", "host", "disk"]


TIERS: tuple[Tier, ...] = ("device", "host", "disk")


def percents(share: Share) -> dict[Tier, float]:
    """The percents of a share by tier."""
    return {"device": share.gpu, "host": share.cpu, "disk": share.disk}
