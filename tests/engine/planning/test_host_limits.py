"""Protects: memory and cores are those that the control groups of this process leave, in both versions and nested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from real_groups import made_group, run_in

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
    """Pages of files are given up when memory is asked for: all of 62 GiB but 1 GiB of the processes' own.

    Also those that were read twice, as a checkpoint is by a second engine: 20 GiB on the active list.
    """
    files: dict[str, str | int] = {
        "sys/fs/cgroup/memory.max": 64 * GIB,
        "sys/fs/cgroup/memory.current": 62 * GIB,
        "sys/fs/cgroup/memory.stat": f"anon {GIB}\nfile {61 * GIB}\ninactive_file {41 * GIB}\nactive_file {20 * GIB}",
    }
    found = host_limits(tree(tmp_path, "0::/", V2.format(root="/", point="/sys/fs/cgroup"), files))
    assert found == limited(63 * GIB, 64 * GIB)
    assert (found.available, found.total) == (63 * GIB, 64 * GIB)


def test_what_the_system_cannot_take_back_counts_as_used(tmp_path: Path) -> None:
    """Files in memory (tmpfs), code that runs, locked pages; swap that a group may use is no memory."""
    stat = {
        "anon": 4 * GIB,
        "file": 17 * GIB,  # of these 8 in tmpfs, on the list of pages without a file, and 1 locked
        "shmem": 8 * GIB,
        "file_mapped": 2 * GIB,
        "inactive_anon": 8 * GIB,
        "active_anon": 4 * GIB,
        "inactive_file": 5 * GIB,
        "active_file": 3 * GIB,
        "unevictable": GIB,
        "slab": 2 * GIB,
        "slab_reclaimable": GIB,
        "slab_unreclaimable": GIB,
    }
    files: dict[str, str | int] = {
        "cg/memory.max": 32 * GIB,
        "cg/memory.current": 23 * GIB,
        "cg/memory.swap.max": 100 * GIB,
        "cg/memory.swap.current": 0,
        "cg/memory.stat": "\n".join(f"{name} {value}" for name, value in stat.items()),
    }
    found = host_limits(tree(tmp_path, "0::/", V2.format(root="/", point="/cg"), files))
    assert found == limited((32 - (4 + 8 + 1 + 2 + 1)) * GIB, 32 * GIB)  # the last: slab, 2 - 1


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
        f"{memory}/memory.stat": f"hierarchical_memory_limit {16 * GIB}\ninactive_file 0\n"
        f"total_inactive_file {3 * GIB}",
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


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the kernel shows to a process somewhere, and what it can have there: memory, its limit, cores."""

    groups: str
    mounts: str
    files: dict[str, str | int]
    expected: tuple[int, int, int]


UNIFIED = "/sys/fs/cgroup"
POD = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice"
HYBRID = V1.format(root="/", point="/sys/fs/cgroup/memory", controllers="memory") + V1.format(
    root="/", point="/sys/fs/cgroup/cpu,cpuacct", controllers="cpu,cpuacct"
)
LAYOUTS = {
    # Slurm, cgroup/v2: the job has the limit, the step may use all of it, and the daemon's scope has none.
    "slurm 2": Layout(
        groups="0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0",
        mounts=V2.format(root="/", point=UNIFIED),
        files={
            "sys/fs/cgroup/system.slice/slurmstepd.scope/memory.max": "max",
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/memory.max": 48 * GIB,
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/memory.high": "max",
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/memory.current": 6 * GIB,
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/step_0/memory.max": "max",
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/step_0/user/task_0/memory.max": "max",
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/step_0/user/task_0/memory.current": 5 * GIB,
        },
        expected=(42 * GIB, 48 * GIB, 99),
    ),
    # Slurm, cgroup/v1: the user's group holds all of a user's jobs.
    "slurm 1": Layout(
        groups="9:memory:/slurm/uid_1000/job_7/step_0/task_0\n4:cpuacct,cpu:/slurm/uid_1000/job_7/step_0/task_0",
        mounts=HYBRID,
        files={
            "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT,
            "sys/fs/cgroup/memory/slurm/uid_1000/memory.limit_in_bytes": 60 * GIB,
            "sys/fs/cgroup/memory/slurm/uid_1000/memory.usage_in_bytes": 50 * GIB,
            "sys/fs/cgroup/memory/slurm/uid_1000/memory.stat": "total_inactive_file 0\ninactive_file 99",
            "sys/fs/cgroup/memory/slurm/uid_1000/job_7/memory.limit_in_bytes": 32 * GIB,
            "sys/fs/cgroup/memory/slurm/uid_1000/job_7/memory.memsw.limit_in_bytes": 64 * GIB,
            "sys/fs/cgroup/memory/slurm/uid_1000/job_7/memory.usage_in_bytes": 8 * GIB,
            "sys/fs/cgroup/memory/slurm/uid_1000/job_7/step_0/memory.limit_in_bytes": 32 * GIB,
            "sys/fs/cgroup/cpu,cpuacct/slurm/uid_1000/job_7/cpu.cfs_quota_us": 300000,
            "sys/fs/cgroup/cpu,cpuacct/slurm/uid_1000/job_7/cpu.cfs_period_us": 100000,
            "sys/fs/cgroup/cpu,cpuacct/slurm/uid_1000/job_7/step_0/task_0/cpu.cfs_quota_us": -1,
            "sys/fs/cgroup/cpu,cpuacct/slurm/uid_1000/job_7/step_0/task_0/cpu.cfs_period_us": 100000,
        },
        expected=(10 * GIB, 32 * GIB, 3),
    ),
    # systemd: MemoryHigh= and CPUQuota=150% of the user's slice bind a shell that has no limit itself.
    "systemd": Layout(
        groups="0::/user.slice/user-1000.slice/session-2.scope",
        mounts=V2.format(root="/", point=UNIFIED),
        files={
            "sys/fs/cgroup/user.slice/cpu.max": "800000 100000",
            "sys/fs/cgroup/user.slice/user-1000.slice/memory.high": 20 * GIB,
            "sys/fs/cgroup/user.slice/user-1000.slice/memory.max": 24 * GIB,
            "sys/fs/cgroup/user.slice/user-1000.slice/memory.current": 4 * GIB,
            "sys/fs/cgroup/user.slice/user-1000.slice/cpu.max": "150000 100000",
            "sys/fs/cgroup/user.slice/user-1000.slice/session-2.scope/memory.max": "max",
            "sys/fs/cgroup/user.slice/user-1000.slice/session-2.scope/cpu.max": "max 100000",
        },
        expected=(16 * GIB, 20 * GIB, 2),
    ),
    # Kubernetes, version 2: a container sees its own group as the root of a namespace, and no more.
    "kubernetes 2": Layout(
        groups="0::/",
        mounts=V2.format(root="/", point=UNIFIED),
        files={
            "sys/fs/cgroup/memory.max": 16 * GIB,
            "sys/fs/cgroup/memory.current": 3 * GIB,
            "sys/fs/cgroup/memory.stat": f"anon {2 * GIB}\ninactive_file {GIB // 2}\nactive_file {GIB // 2}",
            "sys/fs/cgroup/cpu.max": "400000 100000",
        },
        expected=(14 * GIB, 16 * GIB, 4),
    ),
    # Kubernetes, version 1: the container has no limit, its pod has; only the statistics of the container tell of it.
    "kubernetes 1": Layout(
        groups=f"11:memory:/{POD}/cri-1.scope\n3:cpu,cpuacct:/{POD}/cri-1.scope",
        mounts=V1.format(root=f"/{POD}/cri-1.scope", point="/sys/fs/cgroup/memory", controllers="memory")
        + V1.format(root=f"/{POD}/cri-1.scope", point="/sys/fs/cgroup/cpu,cpuacct", controllers="cpu,cpuacct"),
        files={
            "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": 9 * GIB,
            "sys/fs/cgroup/memory/memory.stat": f"active_file 7\nhierarchical_memory_limit {12 * GIB}\n"
            f"total_inactive_file {4 * GIB}\ntotal_active_file {2 * GIB}\ntotal_mapped_file {GIB}",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": 250000,
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": 100000,
        },
        expected=(8 * GIB, 12 * GIB, 3),
    ),
    # A container that watches others has parts of the tree mounted that it is not in: their limits are not its own.
    "monitor": Layout(
        groups="0::/docker/me",
        mounts=V2.format(root="/docker/other", point="/watched") + V2.format(root="/docker", point="/cg"),
        files={
            "watched/memory.max": GIB,
            "watched/cpu.max": "10000 100000",
            "cg/memory.max": 40 * GIB,
            "cg/memory.current": 10 * GIB,
            "cg/me/memory.max": "max",
            "cg/me/cpu.max": "700000 100000",
        },
        expected=(30 * GIB, 40 * GIB, 7),
    ),
    # A namespace made after the mount: what is mounted is the group above, of which the kernel writes "/..".
    "namespace inside": Layout(
        groups="0::/",
        mounts=V2.format(root="/..", point=UNIFIED),
        files={
            "sys/fs/cgroup/memory.max": 10 * GIB,
            "sys/fs/cgroup/memory.current": GIB,
            "sys/fs/cgroup/cpu.max": "500000 100000",
        },
        expected=(9 * GIB, 10 * GIB, 5),
    ),
    # A limit beyond what a machine shows whose memory grows as it is used is a limit all the same.
    "large": Layout(
        groups="0::/a",
        mounts=V2.format(root="/", point="/cg"),
        files={"cg/a/memory.max": 512 * GIB, "cg/a/memory.current": 2 * GIB},
        expected=(510 * GIB, 512 * GIB, 99),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_limit_that_binds_is_found_wherever_it_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = LAYOUTS[name]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(99), raising=False)
    found = host_limits(tree(tmp_path, layout.groups, layout.mounts, layout.files))
    assert (found.group_available, found.group_total, usable_cores(tmp_path)) == layout.expected
    assert (found.available, found.total) == (min(layout.expected[0], 200 * GIB), min(layout.expected[1], 240 * GIB))


LIMITED = {"memory.limit_in_bytes": str(512 << 20), "memory.max": str(512 << 20)}

_HELD = """
from engine.planning.host_limits import host_limits
held = bytearray(64 << 20)
after = host_limits()
print(json.dumps([after.available, after.total, len(held)]))
"""


def test_a_real_group_s_limit_is_seen() -> None:
    with made_group("memory", LIMITED) as group:
        available, total, held = run_in(group, _HELD)
    assert total == 512 << 20
    assert (512 << 20) - 2 * held < available <= (512 << 20) - held


_READ_TWICE = """
from engine.planning.host_limits import host_limits
before = host_limits().available
path = pathlib.Path(sys.argv[2])
with path.open("wb") as stream:
    for _ in range(200):
        stream.write(os.urandom(1 << 20))
    os.fsync(stream.fileno())
for _ in range(3):
    with path.open("rb", buffering=0) as stream:
        while stream.read(1 << 20):
            pass
name = "memory.usage_in_bytes" if pathlib.Path(sys.argv[1], "memory.usage_in_bytes").exists() else "memory.current"
used = int(pathlib.Path(sys.argv[1], name).read_text())
after = host_limits().available
taken = bytearray(after - (32 << 20))  # the system ends processes of a group that is full
print(json.dumps([before, used, after, len(taken)]))
"""


def test_in_a_real_group_a_file_that_was_read_takes_no_memory_away(tmp_path: Path) -> None:
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=False).stdout
    if kind.strip() in ("tmpfs", "ramfs", "overlayfs", ""):
        pytest.skip(f"files here are on {kind.strip() or 'an unknown system'}")
    with made_group("memory", LIMITED) as group:
        before, used, after, taken = run_in(group, _READ_TWICE, str(tmp_path / "file"))
    assert used > 200 << 20
    assert after > before - (32 << 20)
    assert taken > 350 << 20


_CORES = """
from engine.memory.cores import usable_cores
print(json.dumps([usable_cores()]))
"""


@pytest.mark.skipif(usable_cores() < 2, reason="there is but one core")
def test_a_real_group_s_share_of_time_and_its_cores_are_seen() -> None:
    with made_group("cpu", {"cpu.cfs_quota_us": "90000", "cpu.max": "90000 100000"}) as group:
        assert run_in(group, _CORES) == [1]
        settings = {"cpu.cfs_quota_us": "150000", "cpu.max": "150000 100000"}
        for name in settings:
            if (group / name).exists():
                (group / name).write_text(settings[name])
        assert run_in(group, _CORES) == [2]
    first = min(os.sched_getaffinity(0))
    with made_group("cpuset", {"cpuset.mems": "0", "cpuset.cpus": str(first)}) as group:
        assert run_in(group, _CORES) == [1]


def test_a_process_that_may_run_on_one_core_has_one() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("processes cannot be kept to cores")
    code = f"import os\nos.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\nimport json\n{_CORES}"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(made.stdout) == [1]
