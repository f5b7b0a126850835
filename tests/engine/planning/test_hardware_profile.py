"""Protects: a hardware profile is read strictly and kept per machine; measuring leaves nothing but rates behind."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import re
import resource
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import fake_streams
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import CapacityError, ConfigError, EngineError, InstallationError
from engine.measuring import disk_rates, rates
from engine.measuring import profiler as measuring
from engine.measuring.profiler import Effort, measure
from engine.measuring.together import rates_together
from engine.memory.disk.file import READERS
from engine.planning import hardware_profile
from engine.planning.hardware_profile import HOST_DTYPES, HardwareProfile
from engine.planning.host_limits import HostLimits
from engine.planning.machine import Machine, this_machine

CPU = torch.device("cpu")
SHIPPED = ("h100-16gb", "h100-6gb", "t4")
TINY = Effort(
    seconds=0.001,
    copy_bytes=1 << 16,
    width=32,
    ring_bytes=1 << 14,
    rows=(1, 4),
    context=4,
    prefill_sequences=1,
    device_cache_bytes=1 << 18,
    host_cache_bytes=1 << 18,
    disk_bytes=16 << 20,
    disk_seconds=0.1,
)

words = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
rate = st.floats(min_value=1e-300, max_value=1e300)
counts = st.integers(1, 10**15)
by_dtype = st.fixed_dictionaries(dict.fromkeys(HOST_DTYPES, rate))
profiles = st.builds(
    HardwareProfile,
    machine=st.builds(
        Machine,
        accelerators=st.lists(words, max_size=3).map(tuple),
        processor=words,
        cores=counts,
        host_memory_bytes=counts,
    ),
    device_name=words,
    device_memory_bytes=counts,
    dtype=st.sampled_from(HOST_DTYPES),
    torch=words,
    date=st.dates().map(str),
    gemm_flop_s=st.dictionaries(counts, rate, min_size=1),
    host_attention_bytes_s=by_dtype,
    host_attention_beside_copy_bytes_s=by_dtype,
    **{item.name: rate for item in fields(HardwareProfile) if item.type == "float"},
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory where profiles are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "flexgen-helm"


@pytest.fixture
def profile() -> HardwareProfile:
    return HardwareProfile.load("t4")


@pytest.fixture
def mapping(profile: HardwareProfile) -> dict[str, Any]:
    return profile.as_mapping()


def line_of(call: Callable[[], object], kind: type[EngineError] = ConfigError) -> str:
    """The one line that `call` is refused with."""
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert caught.type is kind
    return str(caught.value)


# The YAML form


@given(profile=profiles)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_what_is_written_is_read_back(profile: HardwareProfile, tmp_path: Path) -> None:
    assert HardwareProfile.load(profile.save(tmp_path / "profile.yaml")) == profile
    assert [path.name for path in tmp_path.iterdir()] == ["profile.yaml"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profiles_load(name: str) -> None:
    profile = HardwareProfile.load(name)
    assert profile.gemm_flop_s[8192] > 0.8 * max(profile.gemm_flop_s.values())
    assert profile.both_ways_bytes_s <= profile.to_device_bytes_s + profile.from_device_bytes_s
    assert profile.cores > 1
    assert profile.host_memory_bytes > profile.device_memory_bytes
    for dtype, alone in profile.host_attention_bytes_s.items():
        assert profile.host_attention_beside_copy_bytes_s[dtype] < alone <= profile.host_bytes_s


def test_one_card_has_one_speed() -> None:
    large, small = HardwareProfile.load("h100-16gb"), HardwareProfile.load("h100-6gb")
    assert (large.device_memory_bytes, small.device_memory_bytes) == (16 * 10**9, 6 * 10**9)
    assert replace(large, device_name=small.device_name, device_memory_bytes=small.device_memory_bytes) == small


def test_a_number_and_a_date_may_be_written_as_people_do(mapping: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = yaml.safe_dump({**mapping, "to-device-bytes-s": 0, "date": 0}).replace("date: 0", "date: 2026-01-02")
    file.write_text(text.replace("to-device-bytes-s: 0", "to-device-bytes-s: 12e9"))
    profile = HardwareProfile.load(str(file))
    assert profile.to_device_bytes_s == 12e9
    assert profile.date == "2026-01-02"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"to-device-byte-s": 1.0}, "unknown key 'to-device-byte-s'; did you mean 'to-device-bytes-s'"),
        ({"machine": {"core": 1}}, "machine: unknown key 'core'; did you mean 'cores'"),
        ({"machine": {"cores": 1}}, "machine: missing accelerators, processor, host-memory-bytes"),
        ({"machine": "mine"}, "machine: 'mine' is not a mapping"),
        ({"host-attention-bytes-s": {"float61": 1.0}}, "host-attention-bytes-s: unknown key 'float61'; did you mean"),
        ({"host-attention-bytes-s": {"float16": 1.0}}, "host-attention-bytes-s: missing bfloat16, float32"),
        ({"disk-read-bytes-s": 0}, "disk-read-bytes-s: 0 is not a positive number"),
        ({"disk-read-bytes-s": -1.5}, "disk-read-bytes-s: -1.5 is not a positive number"),
        ({"disk-read-bytes-s": True}, "disk-read-bytes-s: True is not a positive number"),
        ({"disk-read-bytes-s": None}, "disk-read-bytes-s: None is not a positive number"),
        ({"disk-read-bytes-s": float("inf")}, "disk-read-bytes-s: inf is not a positive number"),
        ({"disk-read-bytes-s": float("nan")}, "disk-read-bytes-s: nan is not a positive number"),
        ({"disk-read-bytes-s": "2 GB/s"}, "disk-read-bytes-s: '2 GB/s' is not a positive number"),
        ({"disk-read-bytes-s": 10**400}, "disk-read-bytes-s: 1000"),
        ({"gemm-flop-s": {}}, "gemm-flop-s: no number of rows"),
        ({"gemm-flop-s": {0: 1.0}}, "gemm-flop-s: 0 is not a whole number"),
        ({"gemm-flop-s": {"16": 1.0}}, "gemm-flop-s: '16' is not a whole number"),
        ({"gemm-flop-s": {16: 0.0}}, "gemm-flop-s: 16: 0.0 is not a positive number"),
        ({"device-memory-bytes": 1.5}, "device-memory-bytes: 1.5 is not a whole number"),
        ({"device-memory-bytes": True}, "device-memory-bytes: True is not a whole number"),
        ({"device-name": " "}, "device-name: ' ' is not a text"),
        ({"dtype": "float17"}, "unknown dtype 'float17'; did you mean 'float16'"),
    ],
)
def test_what_cannot_be_meant_is_refused(change: dict[str, Any], said: str, mapping: dict[str, Any]) -> None:
    assert said in line_of(lambda: HardwareProfile.from_mapping({**mapping, **change}))


def test_what_is_missing_is_named(mapping: dict[str, Any]) -> None:
    del mapping["disk-read-bytes-s"], mapping["dtype"]
    said = line_of(lambda: HardwareProfile.from_mapping(mapping))
    assert "missing dtype, disk-read-bytes-s; run `flexgen-helm doctor --profile`" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"- 1\n", "not a mapping"),
        (b"a: [", "not YAML"),
        (b"\xff\xfe\xfa", "not YAML"),
        (b"date: 2026-13-13", "not YAML"),
    ],
)
def test_files_of_another_kind(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "profile.yaml"
    file.write_bytes(content)
    assert said in line_of(lambda: HardwareProfile.load(file))


def test_names_and_files_that_are_not_there(tmp_path: Path) -> None:
    assert "did you mean 'h100-16gb'" in line_of(lambda: HardwareProfile.load("h100-16g"))
    assert "No such file" in line_of(lambda: HardwareProfile.load(tmp_path / "none.yaml"))


# Kept per machine


def on_this_machine(profile: HardwareProfile) -> HardwareProfile:
    return replace(profile, machine=this_machine())


def test_a_profile_is_kept_per_machine(profile: HardwareProfile, cache: Path) -> None:
    assert f"no hardware profile of this machine in {cache}; run" in line_of(HardwareProfile.load)
    mine = on_this_machine(profile)
    assert mine.save().parent == cache
    profile.save()
    assert HardwareProfile.load() == HardwareProfile.load(None) == mine
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    "change",
    [{"accelerators": ("Other GPU",)}, {"processor": "Other"}, {"cores": 999}],
)
def test_a_profile_of_another_machine_is_noticed(
    change: dict[str, Any], profile: HardwareProfile, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = on_this_machine(profile)
    path = mine.save()
    (cache / "hardware-0-broken.yaml").write_text("- 1")
    other = replace(this_machine(), **change)
    monkeypatch.setattr(hardware_profile, "this_machine", lambda: other)
    said = line_of(HardwareProfile.load)
    assert f"profile of another machine: {path} is of {mine.machine}, this is {other}; run `flexgen-helm doctor" in said
    path.rename(hardware_profile.kept_path(other))
    assert "is a profile of another machine" in line_of(HardwareProfile.load)
    assert HardwareProfile.load(hardware_profile.kept_path(other)) == mine  # asked for by name


def test_memory_makes_no_other_machine(profile: HardwareProfile, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It grows on demand in some virtual machines, and a container may have any limit."""
    mine = on_this_machine(profile)
    mine.save()
    other = replace(this_machine(), host_memory_bytes=44 * 2**30)
    assert other.key == mine.machine.key
    now = HostLimits(machine_available=40 * 2**30, machine_total=44 * 2**30, machine_present=128 * 2**30)
    monkeypatch.setattr(hardware_profile, "this_machine", lambda: other)
    monkeypatch.setattr(hardware_profile, "host_limits", lambda: now)
    assert HardwareProfile.load() == replace(mine, machine=other)
    replace(mine, machine=replace(other, host_memory_bytes=125 * 2**30)).save()
    assert HardwareProfile.load().host_memory_bytes == 125 * 2**30  # what it was found to grow to
    replace(mine, machine=replace(other, host_memory_bytes=240 * 2**30)).save()
    assert HardwareProfile.load().host_memory_bytes == 44 * 2**30  # of a machine that had more
    assert replace(other, accelerators=("A/../B \u00e9",)).key.startswith("a-b-")


def test_profiles_whose_names_hold_a_digest_of_memory_are_found(
    profile: HardwareProfile, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = replace(on_this_machine(profile), date="2026-03-01")
    older = replace(mine, date="2025-12-31", disk_read_bytes_s=1.0)
    mine.save(cache / f"hardware-{named_by_memory(mine.machine)}.yaml")
    older.save(cache / "hardware-zzz-00000000.yaml")
    profile.save(cache / "hardware-another-11111111.yaml")
    (cache / "hardware-0-broken.yaml").write_text("- 1")
    assert HardwareProfile.load() == mine
    newest = replace(older, date="2024-01-01")
    newest.save()  # under the name of now, it is the last that was measured
    assert HardwareProfile.load() == newest


def named_by_memory(machine: Machine) -> str:
    """The key that a machine once had."""
    name = re.sub(r"[^a-z0-9]+", "-", (*machine.accelerators, machine.processor)[0].lower()).strip("-")
    return f"{name[:40]}-{hashlib.sha256(str(machine).encode()).hexdigest()[:8]}"


def test_a_profile_is_replaced_whole_or_not_at_all(
    profile: HardwareProfile, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = on_this_machine(profile).save()
    before = path.read_text()

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    said = line_of(replace(on_this_machine(profile), disk_read_bytes_s=1.0).save)
    assert "No space left on device; set XDG_CACHE_HOME" in said
    assert path.read_text() == before
    assert list(cache.iterdir()) == [path]


def test_a_cache_that_cannot_be_written(
    profile: HardwareProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "cannot keep the hardware profile" in line_of(profile.save)


# Measuring


def tensors() -> int:
    gc.collect()
    return sum(type(each) is torch.Tensor for each in gc.get_objects())


def check_rates(profile: HardwareProfile) -> None:
    assert 1 in profile.gemm_flop_s
    for value in profile.as_mapping().values():
        for number in value.values() if isinstance(value, dict) and "cores" not in value else [value]:
            assert not isinstance(number, float) or 0 < number < 1e18
    HardwareProfile.from_mapping(profile.as_mapping())


def test_this_cpu_is_measured_and_nothing_stays(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    measure("cpu", offload_dir=str(place), effort=TINY)  # what libraries keep from their first use
    seed = torch.random.get_rng_state()
    before, threads = tensors(), threading.active_count()
    profile = measure("cpu", offload_dir=str(place / "not" / "there"), effort=TINY)
    assert (tensors(), threading.active_count()) == (before, threads)
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert not list(place.iterdir())
    check_rates(profile)
    assert profile.machine == this_machine()
    assert (profile.dtype, profile.torch) == ("float32", torch.__version__)
    assert profile.device_memory_bytes == profile.host_memory_bytes
    assert profile.host_attention_beside_copy_bytes_s == profile.host_attention_bytes_s
    profile.save()
    assert HardwareProfile.load() == profile


def test_a_device_with_streams_is_measured_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = fake_streams.play(monkeypatch)
    most = 0
    lock = streams.lock

    def count(pointer: int, num_bytes: int) -> int:
        nonlocal most
        code = lock(pointer, num_bytes)
        most = max(most, sum(streams.locked.values()))
        return code

    monkeypatch.setattr("engine.memory.accelerator.lock_pages", count)
    profile = measure("cpu", "bfloat16", offload_dir=str(tmp_path), effort=TINY)
    check_rates(profile)
    assert (most, streams.locked) == (2 * TINY.copy_bytes, {})
    assert streams.called["Stream"] == 1 + 2 + len(HOST_DTYPES)
    assert profile.device_name == "Streams"
    assert profile.device_memory_bytes == 2 * 10**9
    assert profile.dtype == "bfloat16"
    assert profile.host_attention_beside_copy_bytes_s != profile.host_attention_bytes_s


def test_locked_pages_are_given_back_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = fake_streams.play(monkeypatch)

    def fail(*arguments: object, **named: object) -> float:
        assert streams.locked
        raise RuntimeError("out of memory")

    monkeypatch.setattr(rates, "median_seconds", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        rates.link_rates(CPU, 1 << 16)
    assert streams.locked == {}


def test_a_device_that_is_not_here_and_bad_directories(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        line_of(lambda: measure("cuda", effort=TINY), InstallationError)
    (tmp_path / "file").write_text("")
    said = line_of(lambda: measure("cpu", offload_dir=str(tmp_path / "file" / "below"), effort=TINY))
    assert "file is not writable: Not a directory; name another directory" in said
    assert "Not a directory; name another directory" in said


@pytest.mark.parametrize("free", [1 << 26, 1 << 30, 3 << 30, 1 << 37])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("has_device", [True, False])
def test_a_quarter_of_what_is_free_is_enough(
    free: int, dtype: torch.dtype, has_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "free_host_memory", lambda: free)
    monkeypatch.setattr("engine.memory.accelerator.memory", lambda device: (free, free) if has_device else None)
    effort = Effort.fitting(CPU, dtype)
    weights = max(effort.ring_bytes, 2 * effort.width**2 * dtype.itemsize)
    assert weights + 2 * effort.rows[-1] * effort.width * dtype.itemsize <= free // 4
    assert 4 * effort.copy_bytes <= free // 4
    assert max(effort.device_cache_bytes, effort.host_cache_bytes) <= free // 4
    assert effort.width >= 64


def test_the_median_of_repeated_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls, prepared = 0.0, 0, 0

    def call() -> None:
        nonlocal clock, calls
        calls += 1
        clock += {3: 5.0, 4: 1.0, 5: 2.0}.get(calls, 3.0)

    def prepare() -> None:
        nonlocal prepared, clock
        prepared += 1
        clock += 100.0
        assert prepared == calls + 1

    monkeypatch.setattr(rates.time, "perf_counter", lambda: clock)
    assert rates.median_seconds(call, CPU, seconds=0.0, prepare=prepare) == 2.0  # of 5, 1 and 2, after two warm-ups
    assert calls == prepared == 5
    calls = 0
    assert rates.median_seconds(call, CPU, times=9) == 3.0
    assert calls == 11


def test_short_calls_are_timed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, looks = 0.0, 0

    def look() -> float:
        nonlocal clock, looks
        looks += 1
        clock += 0.0004  # what waiting for the end costs
        return clock

    def call() -> None:
        nonlocal clock
        clock += 0.0001

    monkeypatch.setattr(rates.time, "perf_counter", look)
    assert rates.median_seconds(call, CPU) == pytest.approx(0.00014)
    assert looks == 2 * 11


def test_products_that_would_take_too_long_are_left_out() -> None:
    assert list(rates.gemm_rates(CPU, torch.float32, (4, 1, 2), 8, 8, seconds=0.0)) == [1]
    assert list(rates.gemm_rates(CPU, torch.float32, (4, 1, 2), 8, 8)) == [1, 2, 4]


def test_weights_are_multiplied_with_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def linear(left: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append(weight.data_ptr())
        assert left.shape == (3, 16)
        assert weight.shape == (8, 16)
        assert left.any()
        assert weight.any()
        return left @ weight.T

    monkeypatch.setattr(rates.F, "linear", linear)
    rates.gemm_rates(CPU, torch.float32, (3,), 16, 8, ring_bytes=5 * 16 * 8 * 4)
    assert len(set(seen[:5])) == len(set(seen)) == 5


# The disk


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files of this process may not grow beyond 1 MiB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def disk(folder: Path) -> tuple[float, float]:
    return disk_rates.disk_rates(str(folder), num_bytes=16 << 20, seconds=0.1)


def test_no_more_is_written_than_was_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    write = os.pwritev

    def spy(handle: int, buffers: list[Any], place: int) -> int:
        assert bytes(buffers[0][:4096]).strip(b"\0")
        assert not list(tmp_path.iterdir())  # whatever happens from here on, no file stays
        sizes.append(place + len(buffers[0]))
        return write(handle, buffers, place)

    monkeypatch.setattr(os, "pwritev", spy)
    assert min(disk(tmp_path)) > 0
    assert max(sizes) <= 16 << 20
    sizes.clear()
    monkeypatch.setattr(disk_rates, "free_disk", lambda folder: 40 << 20)
    disk(tmp_path)
    assert sizes == [8 << 20]  # a quarter, in whole pieces
    monkeypatch.setattr(disk_rates, "free_disk", lambda folder: 4 << 20)
    assert "4 MB free are too few" in line_of(lambda: disk(tmp_path), CapacityError)


def test_a_full_disk_is_one_line_and_keeps_no_file(tmp_path: Path, small_files: None) -> None:
    said = line_of(lambda: disk(tmp_path), CapacityError)
    assert f"offload-dir {tmp_path}: no room for 17 MB" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["open", "posix_fallocate", "pwritev", "preadv", "fdatasync"])
@pytest.mark.parametrize(("code", "kind"), [(errno.EIO, ConfigError), (errno.ENOSPC, CapacityError)])
def test_a_failing_disk_is_one_line_and_keeps_no_file(
    call: str, code: int, kind: type[EngineError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handles = len(os.listdir("/proc/self/fd"))
    real, failed = getattr(os, call), False

    def fail(*arguments: Any, **named: Any) -> Any:
        nonlocal failed
        if call == "open" and not arguments[1] & os.O_DIRECT:
            return real(*arguments, **named)
        failed = True
        raise OSError(code, "told so")

    monkeypatch.setattr(os, call, fail)
    assert "told so" in line_of(lambda: disk(tmp_path), kind if call != "preadv" else ConfigError)
    monkeypatch.undo()
    assert failed
    assert not list(tmp_path.iterdir())
    assert len(os.listdir("/proc/self/fd")) == handles
    assert not any("Pool" in each.name for each in threading.enumerate())


def test_a_file_system_without_direct_io_is_measured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(name: str, flags: int, *more: int, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(name, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    assert min(disk(tmp_path)) > 0


def test_time_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda handle, first, size: None)
    monkeypatch.setattr(os, "pwritev", lambda handle, buffers, place: written.append(place) or len(buffers[0]))
    read: list[int] = []
    monkeypatch.setattr(os, "preadv", lambda handle, buffers, place: read.append(place) or len(buffers[0]))
    disk_rates.disk_rates(str(tmp_path), num_bytes=1 << 30, seconds=-1.0)
    assert len(written) <= READERS
    assert set(read) <= set(written)  # what was never written is not on the disk


def test_what_cards_do_together_may_be_left_out() -> None:
    """Profiles of one card, and earlier ones, do not have it."""
    profile = HardwareProfile.load("t4")
    assert profile.links_together_bytes_s is None
    assert "gather-bytes-s" not in profile.as_mapping()
    measured = replace(profile, links_together_bytes_s=50e9, gather_bytes_s=380e9)
    assert HardwareProfile.from_mapping(measured.as_mapping()) == measured
    with pytest.raises(ConfigError, match="gather-bytes-s: -1 is not a positive number"):
        HardwareProfile.from_mapping({**measured.as_mapping(), "gather-bytes-s": -1})


@pytest.mark.usefixtures("warm_processes")
def test_devices_measure_together() -> None:
    """Processes, here on the CPU; nothing is left of them."""
    link, gather = rates_together(["cpu", "cpu"], 1 << 20)
    assert link > 0
    assert gather > 0
    with pytest.raises(EngineError, match=r"2 devices cannot measure together: .*nowhere"):
        rates_together(["nowhere", "nowhere"], 1 << 20)
