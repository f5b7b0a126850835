"""Protects: every causal family of transformers runs as it does there, or is refused for its reason beforehand."""

from __future__ import annotations

import re
from pathlib import Path

import family_matrix
import pytest
from outcomes import CASES, outcome

DOCUMENT = Path(__file__).parents[3] / "docs" / "families.md"
TITLES = ("All model types", "Refused", "Not tried")
QUICK = frozenset(
    {
        *("bart", "gemma3n_text+shared-keys+sparse-activations", "roberta", "qwen3_next+attention-only"),
        *("doge+moe", "longcat_flash", "minimax_m3_vl_text+sparse", "blt", "git", "jetmoe", "zamba2+shared"),
        *("cpmant", "hrm_text", "reformer", "dory", "inkling2_text", "minimax", "zaya"),
    }
)
"""Run by `make test`; the others by `make slow ARGS=tests/engine/model/test_every_family.py`."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in CASES
        if name not in family_matrix.NOT_BUILT
    ],
)
def test_every_family(name: str, tmp_path: Path) -> None:
    assert re.search(family_matrix.REFUSED.get(name, "^equal$"), outcome(name, tmp_path))


def test_the_document_lists_every_family() -> None:
    """docs/families.md has every model type of transformers in one of its three lists."""
    text = DOCUMENT.read_text(encoding="utf-8")
    equal, refused, not_built = (text.split(f"## {title}")[1].split("\n## ")[0] for title in TITLES)
    kinds = {name for name in CASES if "+" not in name and name not in family_matrix.MULTIMODAL}
    assert set(re.findall("`([^` ]+)`", equal.split("\n\n")[3])) == {
        name for name in kinds if name not in family_matrix.REFUSED and name not in family_matrix.NOT_BUILT
    }
    rows = [line for line in refused.splitlines() if line.startswith("| `")]
    listed = {name for line in rows for name in re.findall("`([^`]+)`", line.split("|")[1])}
    assert listed >= {name for name in kinds if name in family_matrix.REFUSED}
    assert set(re.findall("`([^` ]+)`", not_built.split("\n\n")[1])) == set(family_matrix.NOT_BUILT)
    multimodal = text.split("## Text of multimodal models")[1].split("\n## ")[0]
    assert {*re.findall("`([^` ]+)`", multimodal)} >= {kind for kind, _ in family_matrix.MULTIMODAL.values()}
