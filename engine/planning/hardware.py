"""This machine's device, memory, and best dtype. torch is imported only inside functions."""

from __future__ import annotations

import os
import warnings

from engine.errors import ConfigError, InstallationError
from engine.memory.cores import usable_cores
from engine.memory.paths import existing_parent
from engine.memory.tiers import Memory as Memory
from engine.planning.fit import gb
from engine.planning.host_growth import known_limits, tried
from engine.planning.host_limits import HostLimits, host_limits, own_memory

_USABLE_HOST = 0.9
"""The share of the available host memory that a run may use."""


def resolve_device(name: str | tuple[str, ...]) -> str:
    """The device that a policy's `device` selects, the first one of several.

    Raises `InstallationError` when a named device does not exist.
    """
    if not isinstance(name, str):
        return resolve_device(name[0])
    if name.startswith("cpu"):
        if int(name.partition(":")[2] or 0) >= usable_cores():
            raise InstallationError(
                f"device {name}: this process may use {usable_cores()} cores, a device of the CPU each at most; name "
                f"cpu:0 to cpu:{usable_cores() - 1}"
            )
        return "cpu"  # torch computes on one CPU: its devices are processes with a part of the cores each
    import torch

    from engine.memory import accelerator

    if name in ("auto", "all"):
        kinds = ("cuda", "xpu") if name == "all" else ("cuda",)
        return next((kind for kind in kinds if accelerator.is_available(kind)), "cpu")
    kind, _, index = name.partition(":")
    if not accelerator.is_available(kind):
        raise InstallationError(f"device {name}: torch {torch.__version__} sees no {kind} device; use device: cpu")
    count = sum(device.type == kind for device in accelerator.devices())
    if index and int(index) >= count:  # torch takes 256 for 0
        raise InstallationError(f"device {name}: there are only {count} {kind} devices")
    return name


def resolve_dtype(name: str, checkpoint: str, device: str) -> str:
    """The dtype that "auto" selects: the checkpoint's on an accelerator, float32 on the CPU.

    bfloat16 falls back to float16, with a notice, on GPUs that only emulate it (before sm80).
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
    """The memory that a run may use: the policy's limits, or 90 % of the free memory of each tier.

    Where device and host memory are the same (CPU, MPS), the device tier is a budget like any other; unless limited, it
    may be all of it. There `cpu_memory` limits the whole process.
    """
    found = None
    if device != "cpu":
        import torch

        from engine.memory import accelerator

        found = accelerator.memory(torch.device(device))
    limits, own = known_limits(), own_memory() if found is None else 0
    if cpu_memory is not None and (placed := _placed(cpu_memory, own)) > limits.available:
        warnings.warn(f"cpu-memory {gb(cpu_memory)} exceeds {_beyond(limits, placed)}", stacklevel=2)
    return memory_within(
        limits.available,
        None if found is None else found[0],
        free_disk(offload_dir) if offload_dir else 0,
        gpu_memory,
        cpu_memory,
        own_bytes=own,
    )


def memory_within(
    host_bytes: int,
    device_bytes: int | None,
    disk_bytes: int,
    gpu_memory: int | None,
    cpu_memory: int | None,
    *,
    own_bytes: int = 0,
) -> Memory:
    """The part of so much memory that a policy lets a run use; `device_bytes` is None where it is the host's.

    `cpu_memory` applies even where `host_bytes`, the available memory that a machine reports, is less, because the user
    asked for it. The process already has `own_bytes` of host memory, which count against `cpu_memory`.
    """
    host = int(host_bytes * _USABLE_HOST) if cpu_memory is None else _placed(cpu_memory, own_bytes)
    if device_bytes is not None:
        tier = int(device_bytes * 0.95)
        return Memory(device=tier if gpu_memory is None else min(gpu_memory, tier), host=host, disk=disk_bytes)
    device = host if gpu_memory is None else min(gpu_memory, host)
    return Memory(device=device, host=host, disk=disk_bytes, shared=True)


def _placed(cpu_memory: int, own_bytes: int) -> int:
    """The bytes that `cpu-memory` lets a process place that already holds `own_bytes`."""
    # A limit below what the process holds can only mean what is placed. From there to twice as much nothing changes.
    return max(cpu_memory - own_bytes, min(cpu_memory, own_bytes))


def _beyond(limits: HostLimits, placed: int) -> str:
    """The rest of a message about a policy that exceeds the host's memory: what it exceeds, the effect, the remedy."""
    if limits.group_available is not None and placed > limits.group_available:
        return (
            f"the {gb(limits.group_available)} that this process's control group (container, batch job) still allows: "
            "using it all the same; lower it or raise the group's limit, since the system ends processes that take more"
        )
    shown = f"the {gb(limits.machine_available)} of host memory that the machine says is available: "
    if not limits.may_grow or (trial := tried(placed)) is None:
        return f"{shown}using it all the same; lower cpu-memory unless its memory grows on demand"
    if trial.taken >= placed:
        return f"{shown}its memory grows, and it gave as much when tried"
    return f"{shown}it gave {gb(trial.taken)} when tried; using cpu-memory all the same; lower it"


def free_host_memory() -> int:
    """The host memory available without swapping (`MemAvailable`, and the container's limit), in bytes."""
    return host_limits().available


def free_disk(directory: str) -> int:
    """The free bytes of the disk of `directory`, which need not exist."""
    stats = os.statvfs(existing_parent(directory))
    return stats.f_bavail * stats.f_frsize
