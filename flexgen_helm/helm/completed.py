"""Checks whether a run that has all its files is complete: readable, fully answered, and the same request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError
from engine.reading import open_file, read_bytes

if TYPE_CHECKING:
    from helm.benchmark.run_spec import RunSpec

MOST_BYTES = 4_000_000_000
"""The most bytes of one file of a run: HELM writes 50,000 long prompts and their answers into less."""
_UNANSWERED = b'"success": false'
"""How HELM writes an unanswered request; inside a text, its quotes would be escaped."""


def lack_of(run_path: Path, asked: RunSpec | None = None, judge: str | None = None) -> str:
    """Return why a run that has all its files does not count as completed; empty if it does.

    The run must match `asked`, with the verdicts of the deployment `judge` if a model judges it.
    """
    if damaged := list(damaged_files(run_path)):
        return f"{', '.join(damaged)} cannot be read"
    if failed := num_unanswered(run_path):
        return f"{failed} of its requests failed"
    from flexgen_helm.helm.records.settings import other_settings

    try:
        others = "" if asked is None else other_settings(run_path, asked, judge)
    except EngineError as error:
        return f"it is not known what it was run with: {error}"
    return f"it was run with other settings: {others}" if others else ""


def damaged_files(run_path: str | Path) -> Iterator[str]:
    """Name the files of a run that HELM could not read; a run without any statistics is damaged, too."""
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
    """Count a run's failed requests in its own file; 0 if that cannot be read.

    The file is read in pieces, because it may be larger than memory.
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
