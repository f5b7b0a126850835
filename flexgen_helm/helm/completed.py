"""Whether a run that has all its files is whole: HELM's own tools can read each, and all requests were answered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.reading import open_file, read_bytes

MOST_BYTES = 4_000_000_000
"""Of one file of a run: HELM writes 50,000 long prompts and their answers into less."""
_UNANSWERED = b'"success": false'
"""As HELM writes it; in a text, quotes would have backslashes."""


def damaged_files(run_path: str | Path) -> Iterator[str]:
    """Name the files of a run that HELM could not read; no statistics at all are damage, too."""
    from helm.common.codec import from_json  # which imports torch

    for name, kind in _kinds().items():
        try:
            found = from_json(read_bytes(Path(run_path) / name, ValueError, limit=MOST_BYTES), kind)
        except Exception:  # a directory, half a file, other bytes, other fields
            yield name
            continue
        if name == "stats.json" and not found:
            yield name


def num_unanswered(run_path: str | Path) -> int:
    """Requests of a run that failed, by its own file; none where that cannot be read.

    A piece at a time: the file may be larger than what memory has room for.
    """
    count, rest, kept = 0, b"", len(_UNANSWERED) - 1
    try:
        with open_file(Path(run_path) / "scenario_state.json", ValueError) as stream:
            while stream.tell() < MOST_BYTES and (piece := rest + stream.read(1 << 20)) != rest:
                count += piece.count(_UNANSWERED)
                rest = piece[-kept:]
    except (OSError, ValueError):
        return 0
    return count


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
