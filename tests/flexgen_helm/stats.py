"""What HELM wrote of a run, and which of its statistics can be compared with those of HELM's own client."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest

NEVER_COMPARED = ["*runtime*", "batch_size", "finish_reason_*"]
ZERO_IN_THE_REFERENCE = [  # follow from log-probabilities of tokens generated at temperature 0, which it reports as 0.0
    "logprob",
    "perplexity",
    "bits_per_byte",
    "logprob_per_byte",
    "max_prob",
    "*ece_*_bin",
    "platt_*",
    "selective_*",
]


def read(run: Path, file: str) -> Any:
    """A JSON file of a run's directory."""
    return json.loads((run / file).read_text())


def stats_of(run: Path, *, left_out: list[str]) -> dict[str, Any]:
    """The statistics of a run by their names (which are JSON themselves), without those that match `left_out`."""
    return {
        json.dumps(stat["name"], sort_keys=True): {key: value for key, value in stat.items() if key != "name"}
        for stat in read(run, "stats.json")
        if not any(fnmatch.fnmatch(stat["name"]["name"], pattern) for pattern in left_out)
    }


def assert_alike(told: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same statistics, with the same values but for rounding."""
    assert told.keys() == expected.keys()
    for name, stat in expected.items():
        if json.loads(name)["name"] == "num_bytes":  # HELM's client counts three for each byte of half a character
            assert told[name]["count"] == stat["count"], name
            assert told[name]["sum"] <= stat["sum"], name
            continue
        found, deviation = dict(told[name]), stat.get("stddev")
        if deviation is not None:  # HELM takes it from the difference of two squares, which is as good as its root
            rounding = 1e-5 + 1e-7 * abs(stat["mean"])
            assert found.pop("stddev") == pytest.approx(deviation, rel=1e-4, abs=rounding), name
        rest = {key: value for key, value in stat.items() if key != "stddev"} if deviation is not None else stat
        assert found == pytest.approx(rest, rel=1e-4, abs=1e-5), name


def texts_of(run: Path) -> list[str]:
    """The completions of a run, in the order of its requests."""
    return [
        completion["text"]
        for state in read(run, "scenario_state.json")["request_states"]
        for completion in state["result"]["completions"]
    ]
