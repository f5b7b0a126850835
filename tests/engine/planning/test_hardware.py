"""Protects: devices, number formats and memory limits are what the policy says, as far as the machine has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError, InstallationError
from engine.memory import accelerator
from engine.planning.hardware import (
    available_memory,
    free_disk,
    free_host_memory,
    memory_within,
    resolve_device,
    resolve_dtype,
)

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
    assert (limited.device, limited.host, limited.shared) == (2**20, 2**21, False)
    assert available_memory("cpu", 10**15, None, None).device <= free * 1.1  # more than there is


@pytest.mark.parametrize(
    ("gpu", "cpu", "device", "host", "together"),
    [
        (None, None, 18.0, 18.0, 18.0),
        (None, 10, 10.0, 10.0, 10.0),
        (4, None, 4.0, 18.0, 18.0),
        (4, 10, 4.0, 10.0, 14.0),
        (18, 18, 9.0, 9.0, 18.0),
        (12, 9, 18 * 12 / 21, 18 * 9 / 21, 18.0),
    ],
)
def test_on_the_cpu_no_limit_lets_a_run_use_more_than_without(
    gpu: int | None, cpu: int | None, device: float, host: float, together: float
) -> None:
    limits = [None if each is None else each * GB for each in (gpu, cpu)]
    memory = memory_within(20 * GB, None, 0, *limits)
    assert (memory.device / GB, memory.host / GB) == pytest.approx((device, host))
    assert (memory.host if memory.shared else memory.device + memory.host) / GB == pytest.approx(together)


def test_cpu_memory_beyond_what_the_machine_says_is_taken_and_told() -> None:
    with pytest.warns(UserWarning, match=r"cpu-memory 120\.0 GB exceeds the 31\.0 GB of host memory") as told:
        assert memory_within(31 * GB, 16 * GB, 0, None, 120 * GB).host == 120 * GB
    assert len(told) == 1
    with pytest.warns(UserWarning, match=r"cpu-memory 40\.0 GB exceeds the 31\.0 GB"):
        memory = memory_within(31 * GB, None, 0, None, 40 * GB)
    assert (memory.device, memory.host, memory.shared) == (40 * GB, 40 * GB, True)


@pytest.mark.parametrize("device", [None, 16 * GB])
def test_cpu_memory_beyond_a_control_group_s_limit_is_cut_and_told(device: int | None) -> None:
    with pytest.warns(UserWarning, match=r"control group .* still allows: using 9\.0 GB") as told:
        memory = memory_within(10 * GB, device, 0, None, 12 * GB, most_host_bytes=10 * GB)
    assert memory.host == 9 * GB
    assert len(told) == 1
    assert memory_within(10 * GB, device, 0, None, 10 * GB, most_host_bytes=10 * GB).host == 10 * GB


@pytest.mark.parametrize(("limit", "placed"), [(100, 100), (500, 500), (600, 500), (1000, 500), (1100, 600)])
def test_cpu_memory_holds_for_the_whole_process_where_it_can(limit: int, placed: int) -> None:
    memory = memory_within(20 * GB, None, 0, None, limit * 10**6, own_bytes=500 * 10**6)
    assert memory.host == placed * 10**6


def test_a_directory_that_is_still_to_be_made_has_its_parent_s_room(tmp_path: Path) -> None:
    assert free_disk(str(tmp_path / "a" / "b")) == pytest.approx(free_disk(str(tmp_path)), rel=0.1)
    assert available_memory("cpu", None, None, str(tmp_path / "a")).disk > 0
