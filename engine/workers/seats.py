"""The devices that an engine runs on, each with an idle worker process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.errors import EngineError
from engine.memory.cores import usable_cores
from engine.planning.devices import (
    Device,
    busy,
    check_alike,
    check_free,
    devices_of,
    devices_of_stages,
    gathers,
    stands_for_several,
)
from engine.planning.hardware import Memory, available_memory, resolve_device
from engine.policy import Policy
from engine.workers.messages import Look, Seen
from engine.workers.process import WorkerProcess


@dataclass(frozen=True, kw_only=True)
class Seats:
    """The devices of an engine and what each may use."""

    policies: tuple[Policy, ...]
    """One policy for each device, with that device's name."""
    processes: tuple[WorkerProcess | None, ...]
    """An idle process for each device, or None."""
    memory: Memory | None = None
    """The memory that each device's engine may plan with; None if there is only one device."""
    gather: bool = False
    """Whether each device stores a part of the weights, and all parts are gathered for each layer."""
    stages: bool = False
    """Whether each device holds one stage of the model."""
    notes: tuple[str, ...] = ()
    """Warnings about devices that are left out or differ from the others."""


def seats_for(policy: Policy, waiting: Sequence[WorkerProcess] = ()) -> Seats:
    """Choose the devices that `policy` names on this machine; of the idle processes `waiting`, surplus ones are ended.

    The worker processes look at the devices, so that this process does not initialize them. Raises `InstallationError`,
    `ConfigError` or `CapacityError` if devices are absent, do not go together, or are busy.
    """
    if not stands_for_several(policy.device):
        return Seats(policies=(policy,), processes=tuple(_first(list(waiting), 1)) or (None,))
    started = list(waiting) or [WorkerProcess()]
    try:
        seen = started[0].look(policy)
        names = devices_of(policy.device, seen.devices, usable_cores())
        if policy.stages > 1:
            names = devices_of_stages(names, policy.stages)
        if len(names) <= 1:
            return Seats(policies=(_on(policy, names, seen),), processes=tuple(_first(started, 1)))
        note = check_alike(names, seen.devices, policy.gather_weights, stages=policy.stages > 1)
        started = _first(started, len(names))
        started += [WorkerProcess() for _ in names[len(started) :]]
        policies = [replace(policy, device=name) for name in names]
        found = [each.look(own) for each, own in zip(started, policies, strict=True)]
        notes = [note] if note else []
        if policy.device == "auto" and policy.stages == 1:
            taken = busy(_free_bytes(policies, found), policy.gpu_memory)
            kept = [number for number, own in enumerate(policies) if own.device not in taken] or [0]
            for number in set(range(len(policies))).difference(kept):
                started[number].kill()
                notes.append(f"device {policies[number].device} is left out: {taken[str(policies[number].device)]}")
            started, policies = [started[n] for n in kept], [policies[n] for n in kept]
            found = [found[n] for n in kept]
        else:
            check_free(_free_bytes(policies, found), policy.gpu_memory)
        if len(started) == 1:
            return Seats(policies=tuple(policies), processes=tuple(started), notes=tuple(notes))
        memories = [_memory(each) for each in found]
    except BaseException:
        for each in started:
            each.kill()
        raise
    return Seats(
        policies=tuple(policies),
        processes=tuple(started),
        memory=Memory(
            device=min(each.device for each in memories),
            host=min(each.host for each in memories),
            disk=min(each.disk for each in memories),
            shared=memories[0].shared,
        ),
        gather=policy.stages == 1
        and gathers(policy.gather_weights, [str(each.device) for each in policies], alike=not note),
        stages=policy.stages > 1,
        notes=tuple(notes),
    )


def _on(policy: Policy, names: Sequence[str], seen: Seen) -> Policy:
    """Return the policy for a single device; unchanged if the machine has no other device."""
    return replace(policy, device=names[0]) if names and (len(seen.devices) > 1 or policy.device == "all") else policy


def _memory(seen: Seen) -> Memory:
    if isinstance(seen.memory, EngineError):
        raise seen.memory
    return seen.memory


def _free_bytes(policies: Sequence[Policy], found: Sequence[Seen]) -> dict[str, tuple[int, int]]:
    return {
        str(policy.device): seen.free for policy, seen in zip(policies, found, strict=True) if seen.free is not None
    }


def _first(processes: list[WorkerProcess], count: int) -> list[WorkerProcess]:
    """Return the first `count` processes; the others are ended."""
    for each in processes[count:]:
        each.kill()
    return processes[:count]


def seen_here(look: Look) -> Seen:
    """Return the devices and memory that this process sees; loads torch."""
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
