"""`flexgen-helm doctor --profile`: measures this machine, shows the rates and keeps them; imports no HELM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from engine.errors import EngineError
from flexgen_helm.terminal.errors import UsageError

if TYPE_CHECKING:
    from engine.planning.hardware_profile import HardwareProfile

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def profile(offload_dir: str) -> int:
    """Measure, print the table and where it was kept; `UsageError` when it cannot be measured or kept."""
    from engine.measuring.profiler import measure
    from engine.planning.host_limits import host_limits

    limits = host_limits()
    try:
        measured = measure(offload_dir=offload_dir)
        for line in table(measured):
            print(line)
        if limits.may_grow:
            found = measured.host_memory_bytes / 1e9
            print(f"host memory: {limits.total / 1e9:.1f} GB were shown, {found:.1f} GB found by taking them")
        print(f"kept in {measured.save()}", flush=True)
    except EngineError as error:
        raise UsageError(str(error)) from None
    return 0


def table(measured: HardwareProfile) -> Iterator[str]:
    """The lines that show a profile: the device, then one rate each, with its unit."""
    machine, memory = measured.machine, measured.device_memory_bytes / 1e9
    yield f"{measured.device_name}, {memory:.1f} GB, {measured.dtype}, torch {measured.torch}, {measured.date}"
    yield f"{machine.processor}, {machine.cores} cores, {machine.host_memory_bytes / 1e9:.1f} GB"
    for what, rate, unit in _rows(measured):
        yield f"{what:<38}{shown(rate, unit):>15}"


def shown(rate: float, unit: str) -> str:
    """A rate with three digits, such as "52.3 GB/s"."""
    rate = float(f"{rate:.3g}")
    scale, prefix = next(((scale, prefix) for scale, prefix in _PREFIXES if rate >= scale), (1.0, ""))
    value = rate / scale
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} {prefix}{unit}"


def _rows(measured: HardwareProfile) -> Iterator[tuple[str, float, str]]:
    yield "host to device", measured.to_device_bytes_s, "B/s"
    yield "device to host", measured.from_device_bytes_s, "B/s"
    yield "both ways at once, sum", measured.both_ways_bytes_s, "B/s"
    yield "device memory, copy", measured.device_bytes_s, "B/s"
    for rows, rate in measured.gemm_flop_s.items():
        yield f"matrix product, {rows} row{'s' if rows > 1 else ''}", rate, "FLOP/s"
    yield "attention on the device, prefill", measured.prefill_attention_flop_s, "FLOP/s"
    yield "attention on the device, decode", measured.decode_attention_bytes_s, "B/s"
    yield "host memory, read", measured.host_bytes_s, "B/s"
    for dtype, rate in measured.host_attention_bytes_s.items():
        yield f"attention on the host, {dtype}", rate, "B/s"
        if measured.host_attention_beside_copy_bytes_s != measured.host_attention_bytes_s:
            yield "  during a copy to the device", measured.host_attention_beside_copy_bytes_s[dtype], "B/s"
    yield "disk, read", measured.disk_read_bytes_s, "B/s"
    yield "disk, write", measured.disk_write_bytes_s, "B/s"
