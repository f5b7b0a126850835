"""The number of cores that this process may use. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

from engine.memory.control_groups import ROOT, group_directories, read_number


def usable_cores(root: Path = ROOT) -> int:
    """The cores that the process may run on, or the processor time that its control groups grant, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for version, directory in group_directories("cpu", root):
        granted = _granted(version, directory)
        if granted is not None:
            cores = min(cores, granted)
    return max(1, cores)


def _granted(version: int, directory: Path) -> int | None:
    """The number of cores whose time a group may use; None without a limit."""
    if version == 1:
        quota, period = read_number(directory / "cpu.cfs_quota_us"), read_number(directory / "cpu.cfs_period_us")
    else:
        try:
            words = (directory / "cpu.max").read_text(encoding="ascii").split()
            quota, period = int(words[0]), int(words[1])
        except (OSError, ValueError, IndexError):  # ValueError: "max"
            return None
    if quota is None or period is None or quota <= 0 or period <= 0:
        return None
    return -(-quota // period)
