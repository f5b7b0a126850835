"""Protects: stock layers continue from a cache only where the family's own forward computes the same of whole texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch

from engine import Engine, Job
from engine.model.continuation import can_continue
from engine.model.padded import CacheView
from engine.model.stock import StockForward
from engine.model.stock_cache import StockView

Build = Callable[[str], Path]


def continues(path: Path, length: int) -> bool:
    """Whether an opened model says so, with everything bound, and that it still computes what it did."""
    jobs = [Job(prompt=[3, 4, 5], max_new_tokens=4)]
    with Engine.from_pretrained(str(path), policy={"device": "cpu", "percent": [50, 50, 100, 0, 100, 0]}) as engine:
        before = engine.run(jobs)
        model = engine.parts.model
        found = can_continue(model, StockForward(model), length)
        assert engine.run(jobs) == before
    return found


@pytest.mark.parametrize(
    "family", ["opt", "llama-yarn", "gemma3", "gpt-oss", "bloom", "falcon-alibi", "mpt", "gpt-neo"]
)
def test_families_that_do(family: str, build: Build) -> None:
    assert continues(build(family), 60)


def test_too_short_to_tell(build: Build) -> None:
    assert not continues(build("opt"), 5)


def test_a_cache_of_something_else_than_is_attended_to(build: Build) -> None:
    """DeepSeek V3 keeps what its keys and values are made of."""
    assert not continues(build("deepseek-v3"), 60)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_tables_that_depend_on_how_long_a_text_is(kind: str, tmp_path: Path) -> None:
    told: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    changes: dict[str, Any] = {"max_position_embeddings": 32}
    if kind == "longrope":
        told |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 32}
        changes = {"max_position_embeddings": 128, "original_max_position_embeddings": 32}
    family = "llama" if kind == "dynamic" else "phi3"
    path = models.save_model(tmp_path, family, rope_parameters=told, **changes)
    assert continues(path, 30)
    assert not continues(path, 60)


@pytest.mark.parametrize("fault", ["twice", "never", "mask", "positions"])
def test_layers_that_do_not(fault: str, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    update = StockView.update
    if fault == "twice":

        def twice(self: StockView, *new: torch.Tensor, **others: Any) -> Any:
            update(self, *new)
            return update(self, *new)

        monkeypatch.setattr(StockView, "update", twice)
    elif fault == "never":
        monkeypatch.setattr(CacheView, "update", lambda self, key, value, *_, **__: (key, value))
    elif fault == "mask":  # a cache that tells of no tokens before
        monkeypatch.setattr(StockView, "get_mask_sizes", lambda self, length: (length, 0))
    else:
        monkeypatch.setattr(StockView, "get_seq_length", lambda self: 0)
    assert not continues(build("llama"), 60)
