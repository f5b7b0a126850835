"""Decides how many workers a cluster is asked for, with which resources each, and on which machines (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of the cluster."""

    id: str
    """Ray's id of the node."""
    name: str
    gpus: int
    cpus: int


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the user asks for; None means everything that is there."""

    workers: int | None = None
    gpus_per_worker: int | None = None

    def check(self) -> None:
        """Raise `ConfigError` for numbers out of range."""
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"--workers {self.workers} is below 1")
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise ConfigError(f"--gpus-per-worker {self.gpus_per_worker} is negative; 0 computes on CPUs")


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The resources of one worker."""

    gpus: int
    cpus: int
    node: str | None = None
    """The machine for the worker; None for any with room."""

    def __str__(self) -> str:
        gpus = f"{self.gpus} GPU{'s' * (self.gpus != 1)} and " if self.gpus else ""
        return f"{gpus}{self.cpus} CPU{'s' * (self.cpus != 1)}"


def nodes_of(listed: Iterable[Mapping[str, Any]]) -> list[Node]:
    """Return the machines of `ray.nodes()` that are alive."""
    return [
        Node(
            id=each["NodeID"],
            name=each["NodeManagerHostname"],
            gpus=int(each["Resources"].get("GPU", 0)),
            cpus=int(each["Resources"].get("CPU", 0)),
        )
        for each in listed
        if each["Alive"]
    ]


def slots_of(wanted: Wanted, nodes: Sequence[Node]) -> list[Slot]:
    """Return the workers that `wanted` means on these machines.

    Without a number of workers: one for each machine with GPUs, with all its GPUs or, if `gpus_per_worker` is set, as
    many workers as its GPUs allow; if no machine has GPUs, or 0 per worker is asked for, one for each machine. With a
    number: that many, wherever there is room, each with as many GPUs (or CPUs) as lets all of them run at the same
    time.
    """
    on_gpus = wanted.gpus_per_worker != 0 and (bool(wanted.gpus_per_worker) or any(node.gpus for node in nodes))
    if wanted.workers is not None:
        return [_alike(wanted.workers, wanted.gpus_per_worker, nodes, on_gpus=on_gpus)] * wanted.workers
    slots = []
    for node in nodes:
        if not on_gpus and node.cpus:
            slots.append(Slot(gpus=0, cpus=node.cpus, node=node.id))
        elif on_gpus and node.gpus:
            gpus = wanted.gpus_per_worker or node.gpus
            slots += [Slot(gpus=gpus, cpus=max(1, node.cpus * gpus // node.gpus), node=node.id)] * (node.gpus // gpus)
    return slots


def _alike(count: int, gpus: int | None, nodes: Sequence[Node], *, on_gpus: bool) -> Slot:
    if not on_gpus:
        return Slot(gpus=0, cpus=_largest(count, [node.cpus for node in nodes]))
    gpus = gpus or _largest(count, [node.gpus for node in nodes])
    shares = [node.cpus * gpus // node.gpus for node in nodes if node.gpus >= gpus]
    return Slot(gpus=gpus, cpus=max(1, min(shares, default=1)))


def _largest(count: int, sizes: Sequence[int]) -> int:
    """Return the largest part size such that machines of these sizes hold `count` parts; 1 if there is none."""
    return next((part for part in range(max(sizes, default=1), 1, -1) if sum(s // part for s in sizes) >= count), 1)


def num_fitting(slots: Sequence[Slot], nodes: Sequence[Node], free: Mapping[str, tuple[int, int]]) -> int:
    """Return how many of these workers have room now; `free`: unused GPUs and CPUs by machine."""
    left = {node.id: list(free.get(node.id, (node.gpus, node.cpus))) for node in nodes}
    count = 0
    for slot in slots:
        for at in [slot.node] if slot.node is not None else left:
            if at in left and left[at][0] >= slot.gpus and left[at][1] >= slot.cpus:
                left[at][0] -= slot.gpus
                left[at][1] -= slot.cpus
                count += 1
                break
    return count
