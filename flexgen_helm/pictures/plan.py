"""The policies that `plan` has estimated: time and memory over the part of the weights that lies on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.memory.tiers import Tier
from engine.planning.hardware import Memory
from flexgen_helm.pictures.figure import picture
from flexgen_helm.planning.estimate import Estimate
from flexgen_helm.planning.forecast import duration, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[float, float]]
_TIERS: Mapping[Tier, tuple[str, str]] = {
    "device": ("GPU", "tab:green"),
    "host": ("host memory", "tab:blue"),
    "disk": ("disk", "tab:gray"),
}


def draw_plan(found: Sequence[Estimate], best: Estimate, memory: Memory, title: str, path: Path) -> None:
    """Draw all that `search` found, `best` marked, into `path`; `ConfigError` where that cannot be written.

    Above, the least time of each percent of the weights on the device, a line for each kind of policy; it ends where
    none fits. Below, what lies on each tier at the fullest, with policies of the kind of `best`.
    """
    with picture(path, 11, 8) as figure:
        times, room = figure.subplots(2, 1, sharex=True)
        figure.suptitle(title)
        _draw_times(times, found, best)
        _draw_room(room, found, best, memory)
        room.set_xlabel("weights on the GPU, %")
        for axes in (times, room):
            axes.grid(alpha=0.3)
            axes.set_ylim(0, 1.05 * axes.dataLim.ymax)
            axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))


def times_of(found: Sequence[Estimate]) -> dict[str, Points]:
    """The fastest policy's seconds by percents of the weights on the device, for each kind of policy."""
    kinds: dict[str, dict[float, Estimate]] = {}
    for each in found:
        _keep_fastest(kinds.setdefault(_kind(each), {}), each)
    return {
        kind: sorted((gpu, each.seconds) for gpu, each in by_percent.items())
        for kind, by_percent in sorted(kinds.items(), key=lambda item: min(each.seconds for each in item[1].values()))
    }


def rooms_of(found: Sequence[Estimate], best: Estimate) -> dict[Tier, tuple[Points, Points]]:
    """Gigabytes of weights, and of all that is held, of each tier that is used; with policies of the kind of `best`."""
    fastest: dict[float, Estimate] = {}
    for each in found:
        if _kind(each) == _kind(best):
            _keep_fastest(fastest, each)
    fastest[best.plan.weights.gpu] = best
    rooms: dict[Tier, tuple[Points, Points]] = {}
    for tier in _TIERS:
        weights, held = (
            [(gpu, getattr(each, name)[tier] / 1e9) for gpu, each in sorted(fastest.items())]
            for name in ("weights", "held")
        )
        if any(number for _, number in held):
            rooms[tier] = weights, held
    return rooms


def _keep_fastest(by_percent: dict[float, Estimate], each: Estimate) -> None:
    gpu = each.plan.weights.gpu
    if gpu not in by_percent or each.seconds < by_percent[gpu].seconds:
        by_percent[gpu] = each


def _kind(found: Estimate) -> str:
    policy = found.policy
    codes = policy.compress_weight
    weights = f"weights in {codes} bits" if codes in (8, 4) else f"{codes or 'plain'} weights"
    parts = [weights, *([f"cache in {policy.compress_cache} bits"] if policy.compress_cache else [])]
    parts += ["attention on the host"] if policy.cpu_cache_compute else []
    return ", ".join([*parts, *(["disk"] if found.plan.uses_disk else [])])


def _draw_times(axes: Axes, found: Sequence[Estimate], best: Estimate) -> None:
    for number, (kind, points) in enumerate(times_of(found).items()):
        gpu, seconds = zip(*points, strict=True)
        (line,) = axes.plot(gpu, seconds, marker="." if len(points) < 5 else "", label=kind)
        line.set(color=f"C{number % 10}", linestyle="-" if number < 10 else "--")
    chosen = best.plan.weights.gpu
    label = f"chosen: {chosen:g} %, {duration(best.seconds)}"
    axes.plot([chosen], [best.seconds], marker="*", color="black", linestyle="", markersize=12, label=label)
    axes.set_ylabel("least time, s")


def _draw_room(axes: Axes, found: Sequence[Estimate], best: Estimate, memory: Memory) -> None:
    limits: Mapping[Tier, float | None] = {"device": memory.device, "host": memory.host, "disk": None}
    for tier, (weights, held) in rooms_of(found, best).items():
        name, colour = _TIERS[tier]
        gpu, sizes = zip(*weights, strict=True)
        axes.fill_between(gpu, sizes, alpha=0.25, color=colour, label=f"{name}: weights")
        axes.plot(*zip(*held, strict=True), color=colour, label=f"{name}: all that is held")
        if (limit := limits[tier]) is not None:
            axes.axhline(limit / 1e9, color=colour, linestyle="--", linewidth=1, label=f"{name}: {size(limit)} at most")
    axes.axvline(best.plan.weights.gpu, color="black", linewidth=0.8, linestyle=":")
    axes.set_ylabel("GB")
    axes.set_title(_kind(best), fontsize="medium")
