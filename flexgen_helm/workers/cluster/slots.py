"""Which workers a cluster is asked for: how many, with how much of a machine each, and on which (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of the cluster."""

    id: str
    """Ray's."""
    name: str
    gpus: int
    cpus: int


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the user asks for; None is all there is."""

    workers: int | None = None
    gpus_per_worker: int | None = None

    def check(self) -> None:
        """Raise `ConfigError` for a number that cannot be meant."""
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"--workers {self.workers} is below 1")
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise ConfigError(f"--gpus-per-worker {self.gpus_per_worker} is negative; 0 computes on CPUs")


@dataclass(frozen=True, kw_only=True)
class Slot:
    """What one worker is to have."""

    gpus: int
    cpus: int
    node: str | None = None
    """The machine that it is for; None: any that has room."""

    def __str__(self) -> str:
        gpus = f"{self.gpus} GPU{'s' * (self.gpus != 1)} and " if self.gpus else ""
        return f"{gpus}{self.cpus} CPU{'s' * (self.cpus != 1)}"


def nodes_of(listed: Iterable[Mapping[str, Any]]) -> list[Node]:
    """The machines that are there, of what `ray.nodes()` lists."""
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
    """The workers that `wanted` means on these machines.

    Without a number: one for each machine that has GPUs, with all of them, or as many as its GPUs make; where no
    machine has GPUs, or none are to be used, one for each machine. With a number: that many, wherever there is room, of
    as many GPUs (or CPUs) as lets all of them run at once.
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
    """The largest part of which machines of these sizes hold `count`; 1 where they cannot."""
    return next((part for part in range(max(sizes, default=1), 1, -1) if sum(s // part for s in sizes) >= count), 1)


def num_fitting(slots: Sequence[Slot], nodes: Sequence[Node], free: Mapping[str, tuple[int, int]]) -> int:
    """How many of these workers have room now; `free`: GPUs and CPUs that nobody uses, by machine."""
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
