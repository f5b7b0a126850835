"""Protects: devices, number formats and memory limits are what the policy says, as far as the machine has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError, InstallationError
from engine.memory import accelerator
from engine.planning.hardware import available_memory, free_disk, free_host_memory, resolve_device, resolve_dtype

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
    assert available_memory("cpu", 10**15, 10**15, None).device <= free * 1.1  # more than there is


def test_a_directory_that_is_still_to_be_made_has_its_parent_s_room(tmp_path: Path) -> None:
    assert free_disk(str(tmp_path / "a" / "b")) == pytest.approx(free_disk(str(tmp_path)), rel=0.1)
    assert available_memory("cpu", None, None, str(tmp_path / "a")).disk > 0
