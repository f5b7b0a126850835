"""Protects: a machine that shows less memory than it has is known, tried, and planned for as it was found to be."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from engine.memory.trial import Trial
from engine.planning import hardware_profile, host_growth
from engine.planning.hardware_profile import HardwareProfile
from engine.planning.host_growth import known_limits, reached_total
from engine.planning.host_limits import HostLimits, host_limits
from engine.planning.machine import this_machine

GIB = 2**30
ZONES = """Node 0, zone      DMA
  per-node stats
      nr_inactive_anon 412
  pages free     3840
        min      10
        low      13
        spanned  4095
        present  {dma}
        managed  3840
Node 0, zone   Normal
  pages free     1000
        spanned  99999999
        present  {normal}
        managed  5000
Node 1, zone   Normal
        present  {second}
        managed  0
Node 1, zone   Device
        present  {device}
"""


def zones(gib: float, root: Path) -> Path:
    """The file `zoneinfo` of a machine that has so much in two nodes, and a device that has as much again."""
    pages = int(gib * GIB) // os.sysconf("SC_PAGE_SIZE")
    text = ZONES.format(dma=3998, normal=pages // 2, second=pages - pages // 2 - 3998, device=pages)
    (root / "proc").mkdir(parents=True)
    (root / "proc/zoneinfo").write_text(text)
    return root


@pytest.mark.parametrize(
    ("present", "shown", "grows"), [(128, 31, True), (128, 125.9, False), (24, 23.5, False), (4, 3.2, False)]
)
def test_a_machine_that_has_more_than_it_shows_is_known(
    present: float, shown: float, grows: bool, tmp_path: Path
) -> None:
    """By hand: figures of machines that were seen, but the last: a small one whose kernel keeps much for itself."""
    root = zones(present, tmp_path)
    (root / "proc/meminfo").write_text(f"MemTotal: {int(shown * 2**20)} kB\nMemAvailable: {30 * 2**20} kB\n")
    limits = host_limits(root)
    assert limits.machine_present == present * GIB
    assert limits.may_grow == grows


def growing(*, group: int | None = None, total: int = 31) -> HostLimits:
    return HostLimits(
        machine_available=(total - 1) * GIB,
        machine_total=total * GIB,
        machine_present=128 * GIB,
        group_available=None if group is None else (group - 2) * GIB,
        group_total=None if group is None else group * GIB,
    )


def test_what_a_machine_grows_to_is_available_within_its_groups() -> None:
    grown = growing().grown_to(126 * GIB)
    assert (grown.available, grown.total, grown.may_grow) == (125 * GIB, 126 * GIB, False)
    for impossible in (0, 31 * GIB, 129 * GIB):  # of a machine that had less, or more
        assert growing().grown_to(impossible) == growing()
    grown = growing(group=64).grown_to(126 * GIB)
    assert (grown.available, grown.total) == (62 * GIB, 64 * GIB)
    assert not growing(group=31).may_grow  # files of a container may show its limit as the machine's memory
    assert growing(group=64).may_grow


@pytest.mark.parametrize(
    ("limits", "tried", "gave", "reached"),
    [
        (growing(), 128 * GIB, Trial(taken=120 * GIB, total=126 * GIB), 126),
        (growing(), 128 * GIB, Trial(taken=30 * GIB, total=31 * GIB), 31),
        (growing(), 128 * GIB, None, 31),
        (growing(group=64), int(0.9 * 62 * GIB), Trial(taken=55 * GIB, total=60 * GIB), 60),
        (growing(total=125), None, None, 125),
    ],
)
def test_no_more_is_tried_than_control_groups_allow(
    limits: HostLimits, tried: int | None, gave: Trial | None, reached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def give(most: int) -> Trial | None:
        asked.append(most)
        return gave

    monkeypatch.setattr(host_growth, "host_limits", lambda: limits)
    monkeypatch.setattr(host_growth, "try_memory", give)
    assert reached_total() == reached * GIB
    assert asked == ([] if tried is None else [tried])


def test_what_was_found_is_kept_with_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for module in (host_growth, hardware_profile):
        monkeypatch.setattr(module, "host_limits", growing)
    assert known_limits() == growing()  # nothing is kept
    mine = replace(HardwareProfile.load("t4"), machine=replace(this_machine(), host_memory_bytes=126 * GIB))
    mine.save()
    assert (known_limits().available, known_limits().total) == (125 * GIB, 126 * GIB)
    assert HardwareProfile.load().host_memory_bytes == 126 * GIB
