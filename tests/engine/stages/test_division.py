"""Protects: what each stage plans with, finds in the weight files and keeps of them, and what is refused beforehand."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from staged import staged

from engine import Job, Policy
from engine.checkpoint.description import describe
from engine.errors import ConfigError, UnsupportedError
from engine.model.causal_model import CausalModel
from engine.opening import check_model
from engine.stages.division import divide
from engine.stages.holding import hold
from engine.weights.encoded import kept
from engine.weights.encoded.unit_file import write_unit
from engine.weights.loading import check_checkpoint
from engine.weights.stored_form import shape_of

STAGES = Policy(device=("cpu:0", "cpu:1"), stages=2)


def test_a_stage_has_room_for_the_widest_layer_of_any(build: Callable[[str], Path]) -> None:
    model = CausalModel(build("llama"), torch.float32, torch.device("cpu"))
    divided = divide(model, build("llama"), replace(shape_of(model), unit_bytes=(10, 10, 18, 1)), 2, None)
    assert divided.layers == [range(2), range(2, 3)]
    assert sum(divided.shape.unit_bytes) >= 20
    assert max(divided.shape.unit_bytes) >= 18


def test_a_stage_finds_what_its_layers_share_with_others(build: Callable[[str], Path], tmp_path: Path) -> None:
    one, other = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 2))
    shutil.copytree(build("llama"), tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[other]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for layers in (range(2), range(2, 3)):
        model = CausalModel(tmp_path, torch.float32, torch.device("cpu"))
        model.twins = {one: [other], other: [one]}  # as Zamba's, whose layers are tried for longer
        hold(model, layers)
        check_checkpoint(tmp_path, model)


def test_stages_keep_all_that_they_have_encoded(
    build: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers, both = itertools.count(1), threading.Event()
    lock = kept._locked

    def locked(folder: Path) -> int | None:
        found = lock(folder)
        if next(numbers) == 2:
            both.set()
        return found

    def write(*given: Any) -> None:
        assert both.wait(60)  # until the other stage would write, too
        write_unit(*given)

    monkeypatch.setattr(kept, "_locked", locked)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kept, "write_unit", write)
    with staged(build("llama"), 2, **{"compress-weight": 4}) as stages:
        stages[0].run([Job(prompt=[5, 6], max_new_tokens=1)])
    found = {file.stem for file in tmp_path.glob("flexgen-helm/weights/*/*.safetensors")}
    assert found == {"embedding", "outer", "layer.0", "layer.1", "layer.2", "head"}


def test_what_cannot_be_divided_is_refused_when_the_model_is_checked(build: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedError, match="hand on more than hidden states"):
        check_model(describe(str(build("gemma4"))), STAGES)
    with pytest.raises(ConfigError, match="4 are more than the model's 3 layers"):
        check_model(describe(str(build("llama"))), replace(STAGES, stages=4))
