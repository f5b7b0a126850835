"""The files that a suite leaves, and what of them differs between two suites: times and company do not count."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECORD = "flexgen_run.json"
SUITE_FILES = ("run_spec.json", "scenario.json", "scenario_state.json", "stats.json", "per_instance_stats.json", RECORD)
_TIMES = ("request_time", "request_datetime", "batch_size", "batch_request_time", "cached")
_ROUNDING = 3e-5
"""The engine promises log-probabilities to 1e-5: in other company, sums are added up in another order. Here are squares
and sums of them too."""


def final_files(suite: Path) -> dict[str, bytes]:
    """Bytes of all files of all runs, by "run/file"."""
    folders = (path for path in suite.iterdir() if path.is_dir() and path.name not in ("eval_cache", "groups"))
    return {f"{file.parent.name}/{file.name}": file.read_bytes() for path in folders for file in path.iterdir()}


def differences(one: Path, two: Path) -> list[str]:
    """What differs between two suites of the same runs, but for times, company and rounding; paths within the files."""
    ours, theirs = final_files(one), final_files(two)
    found = sorted(ours.keys() ^ theirs.keys())
    for name in sorted(name for name in ours.keys() & theirs.keys() if not name.endswith(RECORD)):  # it has times
        found += _differences(_settled(json.loads(ours[name])), _settled(json.loads(theirs[name])), name)
    return found


def _settled(content: Any) -> Any:
    """`content` in its order, without times."""
    if isinstance(content, dict):
        return {key: _settled(value) for key, value in content.items() if key not in _TIMES}
    if isinstance(content, list):
        return [_settled(each) for each in content if not _is_time(each)]
    return content


def _is_time(stat: Any) -> bool:
    name = stat.get("name") if isinstance(stat, dict) else None
    return isinstance(name, dict) and any(part in str(name.get("name")) for part in ("runtime", "batch_size"))


def _differences(one: Any, two: Any, where: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(two, dict) and list(one) == list(two):
        for key in one:
            yield from _differences(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for place, (ours, theirs) in enumerate(zip(one, two, strict=True)):
            yield from _differences(ours, theirs, f"{where}[{place}]")
    elif isinstance(one, float) and isinstance(two, float):
        if not math.isclose(one, two, rel_tol=_ROUNDING, abs_tol=_ROUNDING):
            yield f"{where}: {one} and {two}"
    elif one != two:
        yield f"{where}: {str(one)[:80]} and {str(two)[:80]}"
