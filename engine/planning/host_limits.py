"""The host memory available to this process: what the machine has free, and what its control groups allow.

Swap is not counted: swapped memory is read at the rate of a disk. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from engine.memory.control_groups import ROOT, group_directories, read_fields, read_number, read_text

_NO_LIMIT = 1 << 62
"""Control groups of version 1 express "no limit" by the largest number of pages, which is more than this."""
_LEAST_GROWTH = 1 << 30


@dataclass(frozen=True, kw_only=True)
class HostLimits:
    """Bytes of host memory, of the machine and of the control groups that the process is in."""

    machine_available: int
    """The memory available without swapping, as the system reports it (`MemAvailable`). Virtual machines whose
    memory grows on demand ("balloon") report less than there is."""
    machine_total: int
    """The memory that the system has in use and free (`MemTotal`)."""
    machine_present: int = 0
    """The physical memory in all (`present` in `zoneinfo`), not all of which the system may be using; 0 where it is
    not reported."""
    group_available: int | None = None
    """The memory that the tightest control group leaves; the system kills processes that take more. None without a
    limit."""
    group_total: int | None = None
    """The lowest limit of a control group; None without a limit."""

    @property
    def available(self) -> int:
        """The memory that is available now."""
        return max(0, _lower(self.machine_available, self.group_available))

    @property
    def total(self) -> int:
        """The total memory."""
        return _lower(self.machine_total, self.group_total)

    @property
    def may_grow(self) -> bool:
        """Whether the machine has much more memory than it reports: the kernel keeps a fiftieth for itself."""
        grown = _lower(self.machine_present, self.group_total) - self.machine_total
        return grown > max(_LEAST_GROWTH, self.machine_total // 8)

    def grown_to(self, total: int) -> HostLimits:
        """These limits for a machine whose memory is known to grow to `total` when it is used.

        Unchanged where that cannot be this machine, because it has less in all or reports as much already.
        """
        if not self.machine_total < total <= self.machine_present:
            return self
        available = self.machine_available + total - self.machine_total
        return replace(self, machine_available=available, machine_total=total)


def host_limits(root: Path = ROOT) -> HostLimits:
    """Read the kernel's files about this process; `root` contains their tree."""
    facts = read_fields(root / "proc/meminfo")
    total = facts.get("MemTotal:", 0) * 1024 or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits: list[int] = []
    rooms: list[int] = []
    for version, directory in group_directories("memory", root):
        limit, used = _limit_and_use(version, directory)
        if limit is not None and limit < _NO_LIMIT:
            limits.append(limit)
            rooms.append(max(0, limit - used))
    return HostLimits(
        machine_available=facts["MemAvailable:"] * 1024 if "MemAvailable:" in facts else total * 3 // 4,
        machine_total=total,
        machine_present=_present(root),
        group_available=min(rooms, default=None),
        group_total=min(limits, default=None),
    )


def _present(root: Path) -> int:
    """The bytes of memory that the kernel found, without that of other devices, which it may list, too."""
    pages, zone = 0, ""
    for words in map(str.split, read_text(root / "proc/zoneinfo").splitlines()):
        if words[:1] == ["Node"]:
            zone = words[-1]
        elif len(words) == 2 and words[0] == "present" and words[1].isdecimal() and zone != "Device":
            pages += int(words[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def own_memory(root: Path = ROOT) -> int:
    """The bytes that this process holds and the system cannot reclaim: everything but file pages."""
    facts = read_fields(root / "proc/self/status")
    return 1024 * (facts.get("RssAnon:", 0) + facts.get("RssShmem:", 0))


def _limit_and_use(version: int, directory: Path) -> tuple[int | None, int]:
    """A group's limit (None without one) and the bytes of its memory that the system cannot reclaim.

    The lowest limit around a group of version 1 is in its statistics, even if the groups around it are not mounted. In
    version 2, "high" is where the system slows processes down instead of ending them.
    """
    stat = read_fields(directory / "memory.stat")
    if version == 1:
        limits = [read_number(directory / "memory.limit_in_bytes"), stat.get("hierarchical_memory_limit")]
        used, prefix = read_number(directory / "memory.usage_in_bytes"), "total_"
        stat = {name.removeprefix(prefix): value for name, value in stat.items() if name.startswith(prefix)} or stat
    else:
        limits = [read_number(directory / name) for name in ("memory.max", "memory.high")]
        used = read_number(directory / "memory.current")
    limit = min((limit for limit in limits if limit is not None), default=None)
    return limit, max(0, (used or 0) - _reclaimable(stat))


def _reclaimable(stat: Mapping[str, int]) -> int:
    """The bytes that count as a group's use but are reclaimed on demand, counted like `MemAvailable`.

    These are file pages and the kernel's cache of file names. A file that was read twice is on the active list; what
    processes have mapped, such as their own code, is not reclaimed at once.
    """
    mapped = stat.get("file_mapped", stat.get("mapped_file", 0))
    active = max(0, stat.get("active_file", 0) - mapped)
    return stat.get("inactive_file", 0) + active + stat.get("slab_reclaimable", 0)


def _lower(value: int, bound: int | None) -> int:
    return value if bound is None else min(value, bound)
