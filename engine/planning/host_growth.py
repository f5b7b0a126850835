"""Host memory that grows as it is used, as in some virtual machines: what is known of it, and how to find out.

It imports no torch.
"""

from __future__ import annotations

from functools import cache

from engine.errors import ConfigError
from engine.memory.trial import Trial, try_memory
from engine.planning.hardware_profile import HardwareProfile
from engine.planning.host_limits import HostLimits, host_limits

_TRIED = 0.9
"""The share of the control groups' remaining memory that is tried: the system ends processes that take more."""


def known_limits() -> HostLimits:
    """The limits of this process, with what `doctor --profile` found where the machine reports less than it has."""
    limits = host_limits()
    if not limits.may_grow:
        return limits
    try:
        return limits.grown_to(HardwareProfile.load().host_memory_bytes)
    except ConfigError:
        return limits


def reached_total() -> int:
    """The total host memory, or the lowest limit; measured by allocation where the machine reports less than it has."""
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
    """The result of allocating so much memory, once in this process."""
    return try_memory(num_bytes)
