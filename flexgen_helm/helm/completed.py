"""Whether a run that has all its files is whole: each is read as HELM's own tools read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def damaged_files(run_path: str | Path) -> Iterator[str]:
    """Name the files of a run that HELM could not read; no statistics at all are damage, too."""
    from helm.common.codec import from_json  # which imports torch

    for name, kind in _kinds().items():
        try:
            found = from_json((Path(run_path) / name).read_bytes(), kind)
        except Exception:  # a directory, half a file, other bytes, other fields
            yield name
            continue
        if name == "stats.json" and not found:
            yield name


def _kinds() -> dict[str, Any]:
    from helm.benchmark.adaptation.scenario_state import ScenarioState
    from helm.benchmark.metrics.metric import PerInstanceStats
    from helm.benchmark.metrics.statistic import Stat
    from helm.benchmark.run_spec import RunSpec

    return {
        "run_spec.json": RunSpec,
        "scenario.json": dict[str, Any],
        "scenario_state.json": ScenarioState,
        "stats.json": list[Stat],
        "per_instance_stats.json": list[PerInstanceStats],
    }
