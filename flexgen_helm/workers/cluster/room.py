"""Whether a cluster has room for workers now."""

from __future__ import annotations

from typing import Any

from engine.errors import ConfigError
from flexgen_helm.workers.cluster.slots import Wanted, nodes_of, num_fitting, slots_of


def check_room(ray: Any, wanted: Wanted) -> None:
    """Raise `ConfigError` unless the cluster has room for all wanted workers now."""
    from ray._private.state import available_resources_per_node  # the values that `ray.available_resources()` adds up

    nodes = nodes_of(ray.nodes())
    slots = slots_of(wanted, nodes)
    found: dict[str, dict[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
    free = {str(node): (int(each.get("GPU", 0)), int(each.get("CPU", 0))) for node, each in found.items()}
    fitting = num_fitting(slots, nodes, free)
    if fitting < max(1, len(slots)):
        asked = f"{len(slots)} workers of {slots[0]} each" if slots else "a worker"
        raise ConfigError(f"no room for {asked}, but for {fitting}: {told_room(ray)}; --no-wait does not wait for more")


def told_room(ray: Any) -> str:
    """Describe the cluster's resources and how much of them is free."""
    nodes = nodes_of(ray.nodes())
    gpus, cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    free, machines = ray.available_resources(), f"{len(nodes)} machine{'s' * (len(nodes) != 1)}"
    return (
        f"the cluster has {gpus} GPUs and {cpus} CPUs on {machines}, of which {free.get('GPU', 0):.0f} GPUs "
        f"and {free.get('CPU', 0):.0f} CPUs are free"
    )
