"""Protects: engines in processes of their own, one or several, give what plain `transformers` gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import models
import parity
import pytest
from parity import JOBS, PADDINGS, POLICIES
from transformers import PreTrainedModel

from engine import Policy
from engine.workers.remote_engine import RemoteEngine

TWO = ["cpu:0", "cpu:1"]
WAYS: dict[str, dict[str, Any]] = {
    "one": {"device": "cpu"},
    "two": {"device": TWO, "gather-weights": False},
    "two gathering": {"device": TWO, "gather-weights": True},
    "two stages": {"device": TWO, "stages": 2},
}
pytestmark = pytest.mark.usefixtures("warm_processes")

REFUSED_IN_STAGES = ("gemma4", "gemma4-per-layer-inputs", "gemma4-multimodal", "glm-moe-dsa")
"""Whose layers hand on more than hidden states."""
QUICK = ("llama", "thirds", "packed")
CASES = [
    pytest.param(family, *case, way, marks=[] if (family, *case) == QUICK else pytest.mark.slow)
    for family, case, way in product([*models.FAMILIES, *models.OWN_ATTENTION], parity.SELECTION, WAYS)
    if not (way == "two stages" and family in REFUSED_IN_STAGES)
]


@pytest.fixture(scope="module")
def expected(reference: Callable[[str], PreTrainedModel]) -> Callable[[str], list[parity.Expected]]:
    return cache(lambda family: parity.expect(reference(family)))


@pytest.mark.parametrize(("family", "policy", "padding", "way"), CASES)
def test_equals_transformers(
    family: str,
    policy: str,
    padding: str,
    way: str,
    build: Callable[[str], Path],
    expected: Callable[[str], list[parity.Expected]],
    tmp_path: Path,
) -> None:
    settings = {**POLICIES[policy], "pad-to-seq-len": PADDINGS[padding], **WAYS[way], "offload-dir": str(tmp_path)}
    with RemoteEngine.from_pretrained(str(build(family)), Policy.load(settings)) as engine:
        done = engine.run(JOBS)
    assert parity.differences(expected(family), done)[0] == []
