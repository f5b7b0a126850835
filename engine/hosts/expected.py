"""What every host must have in common with the driver, so that all give the same answers (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.checkpoint.identity.result import Identity, differences
from engine.hosts.messages import HostOpened


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the driver has, except for the digest of its weights."""

    identity: Identity
    """The `identity_beside_weights` of the driver's model and policy."""
    versions: Mapping[str, str]
    """Versions that must be equal everywhere, by package or program name."""

    def why_refused(self, told: HostOpened) -> str | None:
        """Why a host cannot give the driver's answers, with both values; None if it can."""
        if (why := why_other_versions(self.versions, told.versions)) is not None:
            return why
        if told.identity != self.identity:
            words = differences(self.identity, told.identity)
            words = words.replace(" then, ", " at the driver, ").replace(" now)", " there)")
            is_dtype = self.identity.get("dtype") != told.identity.get("dtype")
            return f"it has other {words}: {'name a dtype in the policy' if is_dtype else 'copy the model there'}"
        return None


def why_other_weights(own: str | None, there: str | None) -> str | None:
    """Why a host with weights of this digest is refused; None if the digest is the driver's."""
    if own == there:
        return None
    digests = f"sha256 {str(own)[:12]} at the driver, {str(there)[:12]} there"
    return f"it has other weights ({digests}): give all machines the same files"


def why_other_versions(own: Mapping[str, str], there: Mapping[str, str]) -> str | None:
    """Why a host with these versions is refused, with both values; None if they are the driver's."""
    others = [
        f"{name} {there.get(name, 'none')} (the driver has {own.get(name, 'none')})"
        for name in sorted({*own, *there})
        if there.get(name) != own.get(name)
    ]
    return f"it has {' and '.join(others)}: install the same on all machines" if others else None
