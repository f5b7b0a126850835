"""Measures every rate of a machine's hardware profile, with sizes that fit it, and leaves nothing behind."""

from __future__ import annotations

import datetime
import gc
from dataclasses import dataclass, replace

import torch

from engine.kernels.threads import limit_threads
from engine.measuring import rates
from engine.measuring.disk_rates import disk_rates
from engine.measuring.together import rates_together
from engine.memory import accelerator
from engine.memory.cores import usable_cores
from engine.planning.hardware import free_host_memory, resolve_device, resolve_dtype
from engine.planning.hardware_profile import HOST_DTYPES, HardwareProfile
from engine.planning.host_growth import reached_total
from engine.planning.machine import this_machine

_ROWS = (1, 16, 64, 256, 1024, 4096, 8192)
_RING_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Effort:
    """The sizes and durations of measurements."""

    seconds: float
    """The approximate duration of the timed runs of one rate; three runs are timed in any case."""
    copy_bytes: int
    """The size of each of two buffers on the device, and of two on the host."""
    width: int
    """The width of the square weights of matrix products."""
    ring_bytes: int
    """The size of all weights that are multiplied with in turn."""
    rows: tuple[int, ...]
    context: int
    """The tokens of a sequence in attention."""
    prefill_sequences: int
    device_cache_bytes: int
    """The size of the keys and values that attention on the device reads."""
    host_cache_bytes: int
    disk_bytes: int
    disk_seconds: float
    """The longest duration of writing, and of reading."""

    @classmethod
    def fitting(cls, device: torch.device, dtype: torch.dtype) -> Effort:
        """Sizes beyond all caches that take at most a quarter of the free memory on device and host."""
        found, host = accelerator.memory(device), free_host_memory()
        is_fast, free = found is not None, host if found is None else found[0]
        width = 8192 if is_fast else 2048
        ring = min(_RING_BYTES, free // 8)
        while width > 64 and cls._product_bytes(width, ring, dtype) > free // 4:
            width //= 2
        # What many cores need to show what they can do takes a few of them too long.
        host_cache = min(1 << 30, (64 << 20) * usable_cores(), host // 8)
        return cls(
            seconds=0.3,
            copy_bytes=min(1 << (30 if is_fast else 28), free // 16, host // 16) // 4096 * 4096,
            width=width,
            ring_bytes=ring,
            rows=_ROWS,
            context=512,
            prefill_sequences=8 if is_fast else 1,
            device_cache_bytes=min(1 << 30, free // 8) if is_fast else host_cache,
            host_cache_bytes=host_cache,
            disk_bytes=2 << 30,
            disk_seconds=1.5,
        )

    @staticmethod
    def _product_bytes(width: int, ring_bytes: int, dtype: torch.dtype) -> int:
        """The size of the weights, and of the largest left side and result."""
        return max(ring_bytes, 2 * width**2 * dtype.itemsize) + 2 * _ROWS[-1] * width * dtype.itemsize


def measure(
    device: str = "auto", dtype: str = "auto", offload_dir: str = ".", effort: Effort | None = None
) -> HardwareProfile:
    """Measure a device, its host, and the disk that holds `offload_dir`; all memory is released afterwards.

    Where the host may have more memory than it reports, all of it is allocated once, to see whether it grows.

    `dtype` "auto" is float16 on an accelerator and float32 on the CPU. Raises `EngineError` for a device that does not
    exist and for a disk that is full or cannot be written.
    """
    limit_threads()
    place = accelerator.indexed(torch.device(resolve_device(device)))
    number = getattr(torch, resolve_dtype(dtype, "float16", place.type))
    effort = effort or Effort.fitting(place, number)
    # The disk first: what is wrong with it shows at once.
    read, written = disk_rates(offload_dir, num_bytes=effort.disk_bytes, seconds=effort.disk_seconds)
    try:
        return _measure(place, number, effort, read, written, reached_total())
    finally:
        gc.collect()
        accelerator.release_memory(place)


def _measure(
    device: torch.device,
    dtype: torch.dtype,
    effort: Effort,
    disk_read: float,
    disk_written: float,
    host_memory: int,
) -> HardwareProfile:
    seconds = effort.seconds
    to_device, from_device, both_ways = rates.link_rates(device, effort.copy_bytes, seconds)
    links_together, gather = _together(device, effort.copy_bytes) if device.type == "cuda" else (None, None)
    alone, beside = _host_attention(device, effort)
    found, machine = accelerator.memory(device), replace(this_machine(), host_memory_bytes=host_memory)
    return HardwareProfile(
        machine=machine,
        device_name=machine.processor if found is None else accelerator.name_of(device),
        device_memory_bytes=host_memory if found is None else found[1],
        dtype=str(dtype).removeprefix("torch."),
        torch=str(torch.__version__),
        date=datetime.date.today().isoformat(),
        to_device_bytes_s=to_device,
        from_device_bytes_s=from_device,
        both_ways_bytes_s=both_ways,
        gemm_flop_s=rates.gemm_rates(
            device, dtype, effort.rows, effort.width, effort.width, ring_bytes=effort.ring_bytes, seconds=seconds
        ),
        device_bytes_s=rates.device_copy_rate(device, effort.copy_bytes, seconds),
        prefill_attention_flop_s=rates.prefill_attention_rate(
            device, dtype, effort.prefill_sequences, effort.context, seconds
        ),
        decode_attention_bytes_s=rates.decode_attention_rate(
            device, dtype, effort.device_cache_bytes, effort.context, seconds
        ),
        host_bytes_s=max(rates.host_read_rate(effort.copy_bytes, seconds), *alone.values()),
        host_attention_bytes_s=alone,
        host_attention_beside_copy_bytes_s=beside,
        disk_read_bytes_s=disk_read,
        disk_write_bytes_s=disk_written,
        links_together_bytes_s=links_together,
        gather_bytes_s=gather,
        computes_bfloat16=device.type == "cpu" or accelerator.computes_bfloat16(device),
    )


def _together(device: torch.device, num_bytes: int) -> tuple[float, float] | tuple[None, None]:
    """The rates of this device and all others of its kind used at once (links, gathering); None if it is alone."""
    like = [str(each) for each in accelerator.devices() if accelerator.name_of(each) == accelerator.name_of(device)]
    return rates_together(like, num_bytes) if len(like) > 1 else (None, None)


def _host_attention(device: torch.device, effort: Effort) -> tuple[dict[str, float], dict[str, float]]:
    """The rate of attention on the host in bytes per second, by number format: alone, and during a copy to the GPU."""
    alone, beside = dict[str, float](), dict[str, float]()
    for name in HOST_DTYPES:
        dtype, num_bytes = getattr(torch, name), effort.host_cache_bytes
        alone[name] = rates.host_attention_rate(dtype, num_bytes, effort.context, effort.seconds)
        beside[name] = alone[name]
        if accelerator.has_streams(device):
            beside[name] = rates.host_attention_beside_copy_rate(
                device,
                dtype,
                num_bytes,
                effort.context,
                effort.seconds,
                copy_bytes=effort.copy_bytes,
                copy_seconds=4 * num_bytes / alone[name],  # it takes longer beside a copy
            )
    return alone, beside
