"""Protects: memory and cores are those that the control groups of this process leave, in both versions and nested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from engine.memory.control_groups import group_directories
from engine.memory.cores import usable_cores
from engine.planning.host_limits import HostLimits, host_limits, own_memory

GIB = 2**30
V2 = "31 23 0:28 {root} {point} rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "35 31 0:32 {root} {point} rw,relatime - cgroup cgroup rw,{controllers}\n"
NO_LIMIT = "9223372036854771712"


def tree(root: Path, groups: str, mounts: str, files: dict[str, str | int], available: int = 200 * GIB) -> Path:
    """A file tree as the kernel shows it, of a machine with 240 GiB."""
    facts = f"MemTotal: {240 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB\n"
    status = "Name:\tpython\nVmHWM:\t 9999 kB\nRssAnon:\t  300 kB\nRssFile:\t  500 kB\nRssShmem:\t   20 kB\n"
    proc = {
        "proc/self/cgroup": groups,
        "proc/self/mountinfo": mounts,
        "proc/meminfo": facts,
        "proc/self/status": status,
    }
    for name, text in {**proc, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def limited(available: int | None, total: int | None, machine: int = 200 * GIB) -> HostLimits:
    return HostLimits(machine_available=machine, machine_total=240 * GIB, group_available=available, group_total=total)


def test_a_machine_without_control_groups(tmp_path: Path) -> None:
    found = host_limits(tree(tmp_path, "", "", {}))
    assert found == limited(None, None)
    assert (found.available, found.total) == (200 * GIB, 240 * GIB)
    assert own_memory(tmp_path) == 320 * 1024
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))
    nothing = host_limits(tmp_path / "nowhere")
    assert 0 < nothing.available < nothing.total


def test_version_2_in_a_container_after_a_download(tmp_path: Path) -> None:
    """Pages of files that were read once are given up when memory is asked for."""
    files: dict[str, str | int] = {
        "sys/fs/cgroup/memory.max": 64 * GIB,
        "sys/fs/cgroup/memory.current": 62 * GIB,
        "sys/fs/cgroup/memory.stat": f"anon {GIB}\nfile {61 * GIB}\ninactive_file {60 * GIB}\nactive_file {GIB}",
    }
    found = host_limits(tree(tmp_path, "0::/", V2.format(root="/", point="/sys/fs/cgroup"), files))
    assert found == limited(62 * GIB, 64 * GIB)
    assert (found.available, found.total) == (62 * GIB, 64 * GIB)


def test_version_2_nested_without_a_namespace(tmp_path: Path) -> None:
    """A batch system or systemd: the root has no limit, and any group in between may have the lowest."""
    job, step = "sys/fs/cgroup/slurm/job 7", "sys/fs/cgroup/slurm/job 7/step"
    files: dict[str, str | int] = {
        f"{job}/memory.max": 16 * GIB,
        f"{job}/memory.current": 10 * GIB,
        f"{job}/memory.stat": f"inactive_file {GIB}",
        f"{job}/cpu.max": "150000 100000",
        f"{step}/memory.max": "max",
        f"{step}/memory.high": 12 * GIB,
        f"{step}/memory.current": 2 * GIB,
        f"{step}/cpu.max": "max 100000",
    }
    mounts = V2.format(root="/", point="/sys/fs/cgroup")
    found = host_limits(tree(tmp_path, "0::/slurm/job 7/step", mounts, files))
    assert found == limited(7 * GIB, 12 * GIB)
    assert usable_cores(tmp_path) == min(2, len(os.sched_getaffinity(0)))


def test_version_1_beside_others_and_where_it_is_mounted(tmp_path: Path) -> None:
    """The process sees the path on the host, while only its own part is mounted."""
    groups = "5:cpuacct,cpu:/docker/abc\n4:memory:/docker/abc/inner\n2:name=systemd:/docker/abc\n0::/"
    mounts = (
        "31 23 0:28 / /mnt/my\\040groups rw - tmpfs tmpfs rw\nbroken line\n"
        + V1.format(root="/docker/abc", point="/mnt/my\\040groups/memory", controllers="memory")
        + V1.format(root="/docker/abc", point="/mnt/my\\040groups/cpu", controllers="cpu,cpuacct")
        + V2.format(root="/", point="/mnt/my\\040groups/unified")
    )
    memory, cpu = "mnt/my groups/memory", "mnt/my groups/cpu"
    files: dict[str, str | int] = {
        f"{memory}/memory.limit_in_bytes": 16 * GIB,
        f"{memory}/memory.usage_in_bytes": 12 * GIB,
        f"{memory}/memory.stat": f"inactive_file 0\ntotal_inactive_file {3 * GIB}\nhierarchical_memory_limit 1",
        f"{memory}/inner/memory.limit_in_bytes": NO_LIMIT,
        f"{memory}/inner/memory.usage_in_bytes": 1,
        f"{cpu}/cpu.cfs_quota_us": 50000,
        f"{cpu}/cpu.cfs_period_us": 100000,
    }
    found = host_limits(tree(tmp_path, groups, mounts, files))
    assert found == limited(7 * GIB, 16 * GIB)
    assert usable_cores(tmp_path) == 1


def test_a_group_outside_what_is_mounted_is_looked_for_at_the_mount(tmp_path: Path) -> None:
    files: dict[str, str | int] = {"cg/memory.max": 8 * GIB, "cg/memory.current": 9 * GIB}
    found = host_limits(tree(tmp_path, "0::/../other", V2.format(root="/pods/x", point="/cg"), files))
    assert found == limited(0, 8 * GIB)
    assert found.available == 0
    assert [directory for _, directory in group_directories("memory", tmp_path)] == [tmp_path / "cg"]


def test_no_limit_of_version_1_is_none(tmp_path: Path) -> None:
    files: dict[str, str | int] = {"cg/memory.limit_in_bytes": NO_LIMIT, "cg/cpu.cfs_quota_us": -1}
    files["cg/cpu.cfs_period_us"] = 100000
    mounts = V1.format(root="/", point="/cg", controllers="cpu,memory")
    assert host_limits(tree(tmp_path, "4:cpu,memory:/", mounts, files)) == limited(None, None)
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))


@pytest.fixture
def group() -> Iterator[Path]:
    """A group of our own below the one this process is in."""
    if sys.platform != "linux":
        pytest.skip("there are no control groups")
    found = next((pair for pair in group_directories("memory") if (pair[1] / "memory.stat").is_file()), None)
    if found is None:
        pytest.skip("no group of memory is mounted")
    path = found[1] / f"flexgen-test-{os.getpid()}"
    try:
        path.mkdir()
        name = "memory.limit_in_bytes" if found[0] == 1 else "memory.max"
        (path / name).write_text(str(512 << 20))
    except OSError as error:
        with suppress(OSError):
            path.rmdir()
        pytest.skip(f"groups cannot be made here: {error.strerror}")
    yield path
    path.rmdir()


_PROBE = """
import json, os, pathlib, sys
pathlib.Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
from engine.planning.host_limits import host_limits
held = bytearray(64 << 20)
after = host_limits()
print(json.dumps([after.available, after.total, len(held)]))
"""


def test_a_real_group_s_limit_is_seen(group: Path) -> None:
    made = subprocess.run([sys.executable, "-c", _PROBE, str(group)], capture_output=True, text=True, check=True)
    available, total, held = json.loads(made.stdout)
    assert total == 512 << 20
    assert (512 << 20) - 2 * held < available <= (512 << 20) - held
