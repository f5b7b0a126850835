"""What this machine has: device, memory, and the number format that suits it. Imports torch only when asked."""

from __future__ import annotations

import os
import platform
import warnings
from dataclasses import dataclass

from engine.errors import ConfigError, InstallationError
from engine.memory.paths import existing_parent


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a run may use on each tier."""

    device: int
    host: int
    disk: int
    shared: bool = False
    """Device and host tier are the same memory (the CPU): together they may use `host`."""


def resolve_device(name: str) -> str:
    """The device "auto" stands for; `InstallationError` when a named one is not here."""
    if name == "cpu":
        return "cpu"
    import torch

    from engine.memory import accelerator

    if name == "auto":
        return "cuda" if accelerator.is_available("cuda") else "cpu"
    kind, _, index = name.partition(":")
    if not accelerator.is_available(kind):
        raise InstallationError(f"device {name}: torch {torch.__version__} sees no {kind} device; use device: cpu")
    count = sum(device.type == kind for device in accelerator.devices())
    if index and int(index) >= count:  # torch takes 256 for 0
        raise InstallationError(f"device {name}: there are only {count} {kind} devices")
    return name


def resolve_dtype(name: str, checkpoint: str, device: str) -> str:
    """The dtype "auto" stands for: the checkpoint's on an accelerator, float32 on the CPU.

    bfloat16 falls back to float16, with a notice, on cards that compute it only by emulation (before sm80).
    """
    if name == "auto":
        name = "float32" if device == "cpu" else checkpoint
    if name not in ("float32", "float16", "bfloat16"):
        raise ConfigError(f"dtype {name} (the checkpoint's) cannot be computed with; set dtype: float16 or bfloat16")
    if name == "bfloat16" and device != "cpu":
        import torch

        from engine.memory import accelerator

        if not accelerator.computes_bfloat16(torch.device(device)):
            warnings.warn(f"device {device} has no bfloat16: using float16", stacklevel=2)
            return "float16"
    return name


def available_memory(device: str, gpu_memory: int | None, cpu_memory: int | None, offload_dir: str | None) -> Memory:
    """What may be used: the policy's limits, or 90 % of what is free now on each tier.

    Where device and host memory are the same (CPU, MPS), the device tier is a budget like any other; unless limited, it
    may be all of it.
    """
    found = None
    if device != "cpu":
        import torch

        from engine.memory import accelerator

        found = accelerator.memory(torch.device(device))
    free = None if found is None else found[0]
    disk = free_disk(offload_dir) if offload_dir else 0
    return memory_within(free_host_memory(), free, disk, gpu_memory, cpu_memory)


def memory_within(
    host_bytes: int, device_bytes: int | None, disk_bytes: int, gpu_memory: int | None, cpu_memory: int | None
) -> Memory:
    """What a run may use of so much memory, within a policy's limits; `device_bytes` is None where it is the host's."""
    host = int(host_bytes * 0.9)
    limited_host = host if cpu_memory is None else min(cpu_memory, host)
    if device_bytes is None:
        # A limit on one tier says nothing about the other; both together cannot exceed what there is.
        shared = gpu_memory is None or gpu_memory + limited_host > host
        tier = host if gpu_memory is None else min(gpu_memory, host)
        return Memory(device=tier, host=limited_host, disk=disk_bytes, shared=shared and cpu_memory is None)
    tier = int(device_bytes * 0.95)
    device = tier if gpu_memory is None else min(gpu_memory, tier)
    return Memory(device=device, host=limited_host, disk=disk_bytes)


def free_host_memory() -> int:
    """Bytes of host memory that can be had without swapping (`MemAvailable`, and the container's limit)."""
    available = 0
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            for line in stream:
                if line.startswith("MemAvailable:"):
                    available = int(line.split()[1]) * 1024
    except OSError:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4
    try:
        with (
            open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit,
            open("/sys/fs/cgroup/memory.current", encoding="ascii") as used,
        ):
            available = min(available, int(limit.read()) - int(used.read()))
    except (OSError, ValueError):
        pass
    return available


def host_memory() -> int:
    """Bytes of host memory there are (the machine's, or the container's limit)."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit:
            total = min(total, int(limit.read()))
    except (OSError, ValueError):
        pass
    return total


def processor_name() -> str:
    """What the maker calls the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def free_disk(directory: str) -> int:
    """Bytes free where `directory` is, or will be made."""
    stats = os.statvfs(existing_parent(directory))
    return stats.f_bavail * stats.f_frsize
