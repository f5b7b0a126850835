"""The devices that a policy's `device` names on a machine, and whether they can run one model together (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.errors import CapacityError, ConfigError, InstallationError
from engine.memory.device_names import kind_of
from engine.planning.fit import gb

_OWN_BYTES = 1 << 30
"""The memory that a process of ours takes of a GPU before anything is placed: the driver's context."""
_TAKEN_FRACTION = 0.1
"""The share of a GPU's memory, beyond that, above which it counts as used by another process."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device with memory of its own."""

    name: str
    """The name by which torch knows it, such as "cuda:0"."""
    model: str
    """The manufacturer's name of its model."""
    num_bytes: int
    """Its total memory in bytes."""

    def is_like(self, other: Device) -> bool:
        """Whether it has the same model name and memory size."""
        return (self.model, self.num_bytes) == (other.model, other.num_bytes)


def stands_for_several(asked: str | tuple[str, ...]) -> bool:
    """Whether a policy's `device` may name several devices on some machine."""
    return not isinstance(asked, str) or asked in ("auto", "all")


def devices_of(asked: str | tuple[str, ...], seen: Sequence[Device], cores: int) -> tuple[str, ...]:
    """The names of the devices that `asked` selects.

    asked: a policy's `device`. seen: the machine's devices, the best type first. cores: the cores that the process may
    use. Empty where "auto" or "all" is the CPU. Raises `InstallationError` where the list names more devices than there
    are.
    """
    if isinstance(asked, str):
        if asked not in ("auto", "all"):
            return (asked,)
        best = kind_of(seen[0].name) if seen and asked == "all" else "cuda"  # "auto" has never meant another kind
        able = [each for each in seen if kind_of(each.name) == best]
        return tuple(each.name for each in able if asked == "all" or each.is_like(able[0]))
    kind = kind_of(asked[0])
    count = cores if kind == "cpu" else sum(kind_of(each.name) == kind for each in seen)
    missing = [name for name in asked if int(name.partition(":")[2]) >= count]
    if missing:
        have = (
            f"this process may use {count} cores, one at least for each" if kind == "cpu" else _there_are(count, kind)
        )
        raise InstallationError(f"device {', '.join(missing)}: {have}; the list names {len(asked)}")
    return tuple(asked)


def devices_of_stages(names: Sequence[str], stages: int) -> tuple[str, ...]:
    """The first of these devices, one for each stage; raises `InstallationError` if there are too few."""
    if len(names) < stages:
        have = f"only {len(names)}" if len(names) > 1 else "the CPU alone" if not names else "only one"
        raise InstallationError(
            f"stages {stages}: each has a device of its own, and there is {have}; set stages: 1, or list parts of the "
            "CPU (device: [cpu:0, cpu:1])"
        )
    return tuple(names[:stages])


def check_alike(names: Sequence[str], seen: Sequence[Device], gather: bool | None, *, stages: bool = False) -> str:
    """A warning about devices that differ, empty if all are alike; `ConfigError` if they are to gather weights."""
    found = {each.name: each for each in seen}
    devices = [found[name] for name in names if name in found]
    other = next((each for each in devices if not each.is_like(devices[0])), None)
    if other is None:
        return ""
    first = devices[0]
    differ = f"{first.name} is a {first.model} of {gb(first.num_bytes)}, {other.name} a {other.model} of "
    differ += gb(other.num_bytes)
    if gather:
        raise ConfigError(f"gather-weights: {differ}; only like cards gather weights, set gather-weights: false")
    bringing = "" if stages else "each brings all weights itself, and "
    return f"{differ}: {bringing}none takes more memory than the smallest has"


def busy(free: Mapping[str, tuple[int, int]], gpu_memory: int | None) -> dict[str, str]:
    """The devices of which another process leaves too little memory, and why, by name.

    free: free and total bytes, by name. gpu_memory: the policy's limit, None without one.
    """
    found = {}
    for name, (left, total) in free.items():
        taken, needed = total - left, gpu_memory
        if needed is not None:
            if left < min(needed, total - _OWN_BYTES):
                found[name] = f"{gb(left)} of its {gb(total)} are free, less than gpu-memory {gb(needed)}"
        elif taken > _OWN_BYTES + _TAKEN_FRACTION * total:
            found[name] = f"{gb(taken)} of its {gb(total)} are taken by others"
    return found


def check_free(free: Mapping[str, tuple[int, int]], gpu_memory: int | None) -> None:
    """Raise `CapacityError` where a named device is in use: every device would get no more memory than it has left."""
    for name, why in busy(free, gpu_memory).items():
        most = min(left for left, _ in free.values())
        raise CapacityError(
            f"device {name}: {why}; wait for it, leave it out, or set gpu-memory to at most {gb(most)} for all"
        )


def gathers(asked: bool | None, names: Sequence[str], *, alike: bool) -> bool:
    """Whether each of several devices stores and transfers a part of the weights; `asked` is `gather-weights`."""
    return alike and kind_of(names[0]) == "cuda" if asked is None else asked


def _there_are(count: int, kind: str) -> str:
    return (
        f"there is {'no' if count == 0 else 'only 1'} {kind} device"
        if count < 2
        else (f"there are only {count} {kind} devices")
    )
