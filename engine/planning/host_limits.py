"""How much host memory this process can have: what the machine has free, and what its control groups allow.

Imports no torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from engine.memory.control_groups import ROOT, group_directories, read_fields, read_number


@dataclass(frozen=True, kw_only=True)
class HostLimits:
    """Bytes of host memory, of the machine and of the control groups that the process is in."""

    machine_available: int
    """What the system says can be had without swapping (`MemAvailable`). Virtual machines whose memory grows on demand
    ("balloon") show less than there is."""
    machine_total: int
    group_available: int | None = None
    """What the tightest control group leaves; the system kills processes that take more. None without a limit."""
    group_total: int | None = None
    """The lowest limit of a control group."""

    @property
    def available(self) -> int:
        """What can be had now."""
        return max(0, _lower(self.machine_available, self.group_available))

    @property
    def total(self) -> int:
        """What there is in all."""
        return _lower(self.machine_total, self.group_total)


def host_limits(root: Path = ROOT) -> HostLimits:
    """What the files of the kernel tell of this process; `root` holds the tree they are read from."""
    facts = read_fields(root / "proc/meminfo")
    total = facts.get("MemTotal:", 0) * 1024 or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits: list[int] = []
    rooms: list[int] = []
    for version, directory in group_directories("memory", root):
        limit, used = _limit_and_use(version, directory)
        if limit is None or limit >= total:  # version 1 has no word for "none" but a huge number
            continue
        limits.append(limit)
        rooms.append(max(0, limit - used))
    return HostLimits(
        machine_available=facts["MemAvailable:"] * 1024 if "MemAvailable:" in facts else total * 3 // 4,
        machine_total=total,
        group_available=min(rooms, default=None),
        group_total=min(limits, default=None),
    )


def own_memory(root: Path = ROOT) -> int:
    """Bytes that this process holds and the system cannot take back: all but pages of files."""
    facts = read_fields(root / "proc/self/status")
    return 1024 * (facts.get("RssAnon:", 0) + facts.get("RssShmem:", 0))


def _limit_and_use(version: int, directory: Path) -> tuple[int | None, int]:
    """A group's limit, None for none, and what of its memory the system cannot take back.

    Pages of files that were not read lately count as used there, but are given up as soon as memory is asked for.
    """
    stat = read_fields(directory / "memory.stat")
    if version == 1:
        limit, used = read_number(directory / "memory.limit_in_bytes"), read_number(directory / "memory.usage_in_bytes")
        inactive = stat.get("total_inactive_file", stat.get("inactive_file", 0))
    else:
        limits = [read_number(directory / name) for name in ("memory.max", "memory.high")]
        limit = min((limit for limit in limits if limit is not None), default=None)
        used, inactive = read_number(directory / "memory.current"), stat.get("inactive_file", 0)
    return limit, max(0, (used or 0) - inactive)


def _lower(value: int, bound: int | None) -> int:
    return value if bound is None else min(value, bound)
