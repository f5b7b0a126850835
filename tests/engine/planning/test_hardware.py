"""Protects: devices, number formats and memory limits are what the policy says, as far as the machine has them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError, InstallationError
from engine.memory import accelerator
from engine.memory.trial import Trial
from engine.planning import hardware
from engine.planning.hardware import (
    Memory,
    available_memory,
    free_disk,
    free_host_memory,
    memory_within,
    resolve_device,
    resolve_dtype,
)
from engine.planning.host_limits import HostLimits
from engine.planning.model_shape import ModelShape
from engine.planning.planner import make_plan
from engine.policy import Policy

GB = 10**9


def test_auto_device() -> None:
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto").partition(":")[0] == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "xpu:0"])
def test_a_device_that_is_not_here_is_named(name: str) -> None:
    kind = name.partition(":")[0]
    if getattr(torch, kind).is_available():
        pytest.skip(f"there is a {kind} device")
    with pytest.raises(InstallationError, match=f"device {name}: .*no {kind} device.*device: cpu"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["cuda:2", "cuda:256", "cuda:99999999999"])
def test_a_number_that_is_not_here_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch itself takes 256 for 0."""
    monkeypatch.setattr(accelerator, "is_available", lambda kind: True)
    monkeypatch.setattr(accelerator, "devices", lambda: [torch.device("cuda", 0), torch.device("cuda", 1)])
    assert resolve_device("cuda:1") == "cuda:1"
    with pytest.raises(InstallationError, match=f"device {name}: there are only 2 cuda devices"):
        resolve_device(name)


def test_auto_dtype_is_float32_on_the_cpu_and_the_checkpoint_s_elsewhere() -> None:
    assert resolve_dtype("auto", "float16", "cpu") == "float32"
    assert resolve_dtype("auto", "float16", "cuda") == "float16"
    assert resolve_dtype("bfloat16", "float32", "cpu") == "bfloat16"
    with pytest.raises(ConfigError, match="float8_e4m3fn"):
        resolve_dtype("auto", "float8_e4m3fn", "cuda")


def test_memory_on_the_cpu() -> None:
    free = free_host_memory()
    everything = available_memory("cpu", None, None, None)
    assert everything.shared
    assert 0 < everything.device == everything.host <= free * 1.1
    assert everything.disk == 0
    limited = available_memory("cpu", 2**20, 2**21, None)
    assert (limited.device, limited.host, limited.shared) == (2**20, 2**21, True)
    assert available_memory("cpu", 10**15, None, None).device <= free * 1.1  # more than there is


@pytest.mark.parametrize(
    ("gpu", "cpu", "device", "host"),
    [
        (None, None, 18, 18),
        (None, 10, 10, 10),
        (4, None, 4, 18),
        (4, 10, 4, 10),
        (18, 18, 18, 18),
        (12, 9, 9, 9),
        (30, None, 18, 18),
        (30, 10, 10, 10),
    ],
)
def test_on_the_cpu_a_limit_never_raises_what_a_run_uses(
    gpu: int | None, cpu: int | None, device: float, host: float
) -> None:
    """Device and host tier together use `host`: 90 % of 20 GB, or what cpu-memory says."""
    memory = memory_within(20 * GB, None, 0, *(None if each is None else each * GB for each in (gpu, cpu)))
    assert memory == Memory(device=int(device * GB), host=int(host * GB), disk=0, shared=True)


def test_on_the_cpu_no_limit_raises_a_plan() -> None:
    """What is placed and planned for at most, of 24 GB: no more than without limits, and no more than cpu-memory."""
    shape = ModelShape(
        unit_bytes=(100 * 10**6,) * 24,
        embedding_bytes=200 * 10**6,
        outer_bytes=10**6,
        cache_row_bytes=24 * 8192,
        cache_layer_row_bytes=8192,
        hidden_row_bytes=8192,
        work_row_bytes=200_000,
    )

    def planned(gpu: int | None, cpu: int | None) -> int:
        limits = [None if each is None else each * GB for each in (gpu, cpu)]
        memory = memory_within(24 * GB, None, 0, *limits)
        policy = Policy(device="cpu", gpu_memory=limits[0], cpu_memory=limits[1])
        plan = make_plan(shape, policy, memory, on_cpu=True)
        hidden = plan.limits.rows_per_sweep * shape.hidden_row_bytes
        return shape.weight_bytes + sum(plan.cache_budgets.values()) + hidden

    free = planned(None, None)
    assert shape.weight_bytes < free <= 0.9 * 24 * GB
    for gpu, cpu in itertools.product((None, 4, 10, 20, 24), (None, 6, 10, 20)):
        assert planned(gpu, cpu) <= min(free, cpu * GB if cpu else free)
        assert planned(gpu, cpu) <= planned(None, cpu)
        assert planned(gpu, cpu) <= planned(gpu, None)


def shown(**facts: int) -> HostLimits:
    """A machine that shows 31 of 33 GB, with other facts as they are given, in GB."""
    return HostLimits(
        **{"machine_available": 31 * GB, "machine_total": 33 * GB, **{k: v * GB for k, v in facts.items()}}
    )


@pytest.mark.parametrize(
    ("facts", "gave", "said"),
    [
        ({}, None, "the 31.0 GB of host memory that the machine says is available: using it all the same; lower"),
        ({"machine_present": 34}, 0, "the 31.0 GB of host memory that the machine says is available: using it all"),
        ({"machine_present": 137}, None, "the 31.0 GB of host memory that the machine says is available: using it all"),
        ({"machine_present": 137}, 120, ".*: its memory grows, and it gave as much when tried"),
        ({"machine_present": 137}, 62, "the 31.0 GB of .*: it gave 62.0 GB when tried; using cpu-memory all the same"),
        (
            {"machine_present": 137, "group_available": 60, "group_total": 64},
            120,
            "the 60.0 GB that this process's control group .* still allows: using it all the same; lower it",
        ),
    ],
)
def test_cpu_memory_is_taken_at_its_word_and_told_in_one_line(
    facts: dict[str, int], gave: int | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "known_limits", lambda: shown(**facts))
    monkeypatch.setattr(hardware, "own_memory", lambda: 0)
    trial = None if gave is None else Trial(taken=gave * GB, total=137 * GB)
    monkeypatch.setattr(hardware, "tried", lambda num_bytes: trial)
    with pytest.warns(UserWarning, match=f"^cpu-memory 120.0 GB exceeds {said}") as told:
        assert available_memory("cpu", None, 120 * GB, None).host == 120 * GB
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    assert available_memory("cpu", None, 31 * GB, None).host == 31 * GB


def test_what_was_found_of_a_machine_counts_as_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "known_limits", lambda: shown(machine_present=137).grown_to(133 * GB))
    monkeypatch.setattr(hardware, "own_memory", lambda: 0)
    assert available_memory("cpu", None, None, None).host == int(0.9 * 131 * GB)
    assert available_memory("cpu", None, 131 * GB, None).host == 131 * GB


@pytest.mark.parametrize(("limit", "placed"), [(100, 100), (500, 500), (600, 500), (1000, 500), (1100, 600)])
def test_cpu_memory_holds_for_the_whole_process_where_it_can(limit: int, placed: int) -> None:
    memory = memory_within(20 * GB, None, 0, None, limit * 10**6, own_bytes=500 * 10**6)
    assert memory.host == placed * 10**6


def test_a_directory_that_is_still_to_be_made_has_its_parent_s_room(tmp_path: Path) -> None:
    assert free_disk(str(tmp_path / "a" / "b")) == pytest.approx(free_disk(str(tmp_path)), rel=0.1)
    assert available_memory("cpu", None, None, str(tmp_path / "a")).disk > 0
