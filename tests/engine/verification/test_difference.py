"""Protects: near ties of experts excuse a few rows of a layer that has experts, and no fault of a kind of rows."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import models
import pytest
import torch

from engine import Engine, Job
from engine.model.attention.backend import Attending, AttentionBackend
from engine.model.attention.interface import BACKENDS
from engine.verification.difference import KindOfRows
from engine.verification.layerwise import Findings

Compute = Callable[[AttentionBackend, Attending], torch.Tensor]


def compared(path: Path, *, spoiling: Callable[[], None] = lambda: None) -> Findings:
    """Many rows of prompts that are only scored, and five decode steps; `spoiling` is called before the comparison."""
    rng = random.Random(1)
    jobs = [
        Job(prompt=[rng.randrange(3, 500) for _ in range(200)], max_new_tokens=0, prompt_logprobs=True)
        for _ in range(6)
    ]
    jobs.append(Job(prompt=[5, 6, 7, 8, 9], max_new_tokens=6))
    with Engine.from_pretrained(str(path), policy={"device": "cpu", "dtype": "bfloat16"}) as engine:
        done = engine.run(jobs)
        spoiling()
        return engine.compare_with_stock(jobs, done)


def at_fault(found: Findings) -> list[str]:
    return [stage.name for stage in found.stages if not stage.is_within]


def spoil(
    monkeypatch: pytest.MonkeyPatch, method: str, layer: int, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    def wrap(compute: Compute) -> Compute:
        return lambda self, asked: (
            change(compute(self, asked).clone()) if asked.layer == layer else compute(self, asked)
        )

    for kind in {type(backend) for backend in BACKENDS}:
        monkeypatch.setattr(kind, method, wrap(getattr(kind, method)))


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_decode_rows_that_are_all_wrong_are_found_beside_any_number_of_prompts(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = models.save_model(tmp_path, family, max_position_embeddings=256)
    assert at_fault(compared(path)) == []
    spoil(monkeypatch, "decode", 1, lambda attended: attended * 0.5)
    found = compared(path)
    assert at_fault(found) == ["layer 1"]
    stage = found.stages[2]
    assert stage.num_beyond < 0.01 * stage.num_rows
    kinds = {kind.name: kind for kind in stage.kinds}
    assert kinds["decode"] == KindOfRows(name="decode", num_rows=5, num_beyond=5)
    assert sum(kind.num_rows for kind in stage.kinds) == stage.num_rows


@pytest.mark.parametrize(("layer", "is_found"), [(0, True), (1, False)])
def test_only_layers_with_experts_are_excused(
    layer: int, is_found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 0 of the DeepSeek-V3 is dense: one wrong row of hundreds is a fault there."""

    def change(attended: torch.Tensor) -> torch.Tensor:
        attended[0] *= -3
        return attended

    path = models.save_model(tmp_path, "deepseek-v3", max_position_embeddings=256)
    spoil(monkeypatch, "prefill", layer, change)
    found = compared(path)
    stage = found.stages[1 + layer]
    assert 0 < stage.num_beyond < 0.01 * stage.num_rows
    assert stage.relative > found.tolerance >= stage.relative_within > 0
    assert at_fault(found) == [f"layer {layer}"] * is_found
    assert stage.num_excused == (0 if is_found else stage.num_beyond)
    assert [each.may_reroute for each in found.stages] == [False, False, True, True, False]


def test_a_row_that_is_not_finite_is_never_excused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(attended: torch.Tensor) -> torch.Tensor:
        attended[0] = float("nan")
        return attended

    path = models.save_model(tmp_path, "mixtral", max_position_embeddings=256)
    assert at_fault(compared(path, spoiling=lambda: spoil(monkeypatch, "prefill", 1, change))) == ["layer 1"]


@pytest.mark.parametrize(("num_rows", "most"), [(1, 0), (3, 0), (5, 1), (40, 3), (300, 3), (2000, 20)])
def test_how_many_rows_of_a_kind_are_excused(num_rows: int, most: int) -> None:
    """A hundredth, or three if that is more, but never more than a quarter."""
    assert KindOfRows(name="decode", num_rows=num_rows, num_beyond=most).is_rare
    assert not KindOfRows(name="decode", num_rows=num_rows, num_beyond=most + 1).is_rare
