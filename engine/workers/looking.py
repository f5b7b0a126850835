"""What a process sees of the machine's devices and memory."""

from __future__ import annotations

from engine.errors import EngineError
from engine.planning.devices import Device
from engine.planning.hardware import available_memory, resolve_device
from engine.workers.messages import Look, Seen


def seen(look: Look) -> Seen:
    """What is told of it; loads torch."""
    import torch

    from engine.memory import accelerator

    policy, found = look.policy, []
    for each in accelerator.devices():
        found.append(Device(name=str(each), model=accelerator.name_of(each), num_bytes=accelerator.total_memory(each)))
    devices = tuple(found)
    try:
        device = resolve_device(policy.device)
        memory = available_memory(device, policy.gpu_memory, policy.cpu_memory, policy.offload_dir)
        return Seen(devices=devices, free=accelerator.memory(torch.device(device)), memory=memory)
    except EngineError as error:
        return Seen(devices=devices, free=None, memory=error)
