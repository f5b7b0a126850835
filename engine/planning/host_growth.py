"""Host memory that grows as it is used, as that of some virtual machines does: what is known of it, and how to know.

Imports no torch.
"""

from __future__ import annotations

from functools import cache

from engine.errors import ConfigError
from engine.memory.trial import Trial, try_memory
from engine.planning.hardware_profile import HardwareProfile
from engine.planning.host_limits import HostLimits, host_limits

_TRIED = 0.9
"""Of what control groups still allow: the system ends processes that take more."""


def known_limits() -> HostLimits:
    """The limits of this process, with what `doctor --profile` found where the machine shows less than it has."""
    limits = host_limits()
    if not limits.may_grow:
        return limits
    try:
        return limits.grown_to(HardwareProfile.load().host_memory_bytes)
    except ConfigError:
        return limits


def reached_total() -> int:
    """Bytes of host memory, or the lowest limit: found out by taking it where the machine shows less than it has."""
    limits = host_limits()
    if not limits.may_grow:
        return limits.total
    most = limits.machine_present
    if limits.group_available is not None:
        most = min(most, int(_TRIED * limits.group_available))
    trial = try_memory(most)
    shown = host_limits()
    return max(limits.total, shown.total, shown.grown_to(trial.total).total if trial is not None else 0)


@cache
def tried(num_bytes: int) -> Trial | None:
    """What the machine gave when so much was taken, once in this process."""
    return try_memory(num_bytes)
