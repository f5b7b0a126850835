"""Protects: every tier with every compression, attention on either side, page-locked or not, gives the same results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_streams import play
from parity import JOBS, LATER

from engine import Completion, Engine

SOME = [JOBS[0], JOBS[2], JOBS[3], JOBS[7], JOBS[9], JOBS[-3], JOBS[-1]]
"""Shared and nested prefixes, a lone prompt, scoring, one token."""
STEPS = {8: 2 / 255, 4: (15 * 43 - 13 * 41) / (15 * 43)}
"""From the outermost code to the next, as a part of the largest number of a cache in codes of so many bits."""
TIERS = {
    "device": [100, 0, 100, 0, 100, 0],
    "host": [0, 100, 0, 100, 0, 100],
    "disk": [0, 0, 0, 0, 0, 0],
    "mixed": [30, 30, 30, 30, 30, 30],
}
COMPRESSIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "weights": {"compress-weight": 4},
    "cache": {"compress-cache": 8},
    "both": {"compress-weight": 8, "compress-cache": 4},
}


def values(done: list[Completion]) -> list[Any]:
    """All numbers of the completions."""
    return [(list(each.tokens), each.logprobs, each.prompt_logprobs, each.error) for each in done]


@pytest.mark.parametrize("family", ["opt", *LATER[:-1]])  # not the last: codes of its cache follow the order of sums
@pytest.mark.parametrize("device", ["page-locked", "pageable", "no streams"])
@pytest.mark.parametrize("attends", ["device", "host"])
@pytest.mark.parametrize("compression", list(COMPRESSIONS))
def test_the_same_wherever_things_lie(
    compression: str,
    attends: str,
    device: str,
    family: str,
    build: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device != "no streams":
        play(monkeypatch)
    settings = {
        **COMPRESSIONS[compression],
        "cpu-cache-compute": attends == "host",
        "pin-weight": device == "page-locked",
        "device": "cpu",
        "gpu-memory": "1GB",
        "gpu-batch-size": 4,
        "offload-dir": str(tmp_path),
    }
    # A sum in another order may take a number over the middle between two codes of the cache. Rotated back, its step is
    # an eighth in each of its group's 64 numbers.
    most = STEPS[settings["compress-cache"]] / 8 if "compress-cache" in settings else 1e-5
    found: dict[str, list[Any]] = {}
    for name, percent in TIERS.items():
        with Engine.from_pretrained(str(build(family)), policy={**settings, "percent": percent}) as engine:
            found[name] = values(engine.run(SOME))
    assert all(error is None for _, _, _, error in found["device"])
    if attends == "device":
        assert found["disk"] == found["host"]  # bit by bit: nothing but the place differs
    for name in ("host", "disk", "mixed"):
        for one, other in zip(found[name], found["device"], strict=True):
            assert one[0] == other[0]
            assert one[1] == pytest.approx(other[1], abs=most, rel=0)
            assert (one[2] or [None])[1:] == pytest.approx((other[2] or [None])[1:], abs=most, rel=0)
