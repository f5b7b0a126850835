"""Protects: weights that change while they are read end the engine, and kept ones that are damaged are made anew."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import Engine, Job
from engine.errors import CheckpointError
from engine.model.causal_model import CausalModel
from engine.weights.store import WeightStore
from engine.weights.unit_values import UnitValues

Build = Callable[[str], Path]
JOB = Job(prompt=[*range(10, 40)], max_new_tokens=3, prompt_logprobs=True)
WEIGHTS = "model.safetensors"


@pytest.fixture
def model(build: Build, tmp_path: Path) -> Path:
    return Path(shutil.copytree(build("llama"), tmp_path / "model"))


def policy(tmp_path: Path, **more: Any) -> dict[str, Any]:
    """All weights on disk, read from the checkpoint itself in every sweep."""
    return {"device": "cpu", "percent": [0, 0, 100, 0, 100, 0], "offload-dir": str(tmp_path / "offload"), **more}


def other_weights(model: Path, file: Path) -> None:
    state = {name: tensor * 0.5 for name, tensor in load_file(model / WEIGHTS).items()}
    save_file(state, file, metadata={"format": "pt"})


def overwrite(model: Path, tmp_path: Path) -> None:
    """As a training job does that saves into the directory: other numbers, as many bytes, the same file."""
    other_weights(model, tmp_path / "new")
    with (model / WEIGHTS).open("r+b") as stream:
        stream.write((tmp_path / "new").read_bytes())


def replace(model: Path, tmp_path: Path) -> None:
    other_weights(model, tmp_path / "new")
    os.replace(tmp_path / "new", model / WEIGHTS)


def test_weights_overwritten_while_they_are_streamed_end_the_engine(model: Path, tmp_path: Path) -> None:
    with Engine.from_pretrained(str(model), policy=policy(tmp_path)) as engine:
        [before] = engine.run([JOB])
        assert before.error is None
        overwrite(model, tmp_path)
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"model.safetensors was written to .* start again") as caught:
                engine.run([JOB])
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [replace, lambda model, _: (model / WEIGHTS).unlink()])
def test_weights_that_are_replaced_or_deleted_do_no_harm(
    change: Callable[[Path, Path], None], model: Path, tmp_path: Path
) -> None:
    with Engine.from_pretrained(str(model), policy=policy(tmp_path)) as engine:
        [before] = engine.run([JOB])
        change(model, tmp_path)
        [after] = engine.run([JOB])
    assert before.error is after.error is None
    assert (after.tokens, after.prompt_logprobs) == (before.tokens, before.prompt_logprobs)


def test_weights_overwritten_while_they_are_loaded_end_the_engine(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = WeightStore.put

    def put(self: WeightStore, name: str, *rest: Any, **more: Any) -> None:
        given(self, name, *rest, **more)
        if "layers.1.mlp.up_proj" in name:
            overwrite(model, tmp_path)

    monkeypatch.setattr(WeightStore, "put", put)
    with Engine.from_pretrained(str(model), policy={"device": "cpu"}) as engine:
        with pytest.raises(CheckpointError, match=r"model.safetensors was written to"):
            engine.run([JOB])
        with pytest.raises(CheckpointError, match=r"model.safetensors was written to"):
            engine.wait_until_loaded()


def test_weights_may_change_when_they_are_in_memory(model: Path, tmp_path: Path) -> None:
    with Engine.from_pretrained(str(model), policy={"device": "cpu"}) as engine:
        engine.wait_until_loaded()
        [before] = engine.run([JOB])
        overwrite(model, tmp_path)
        [after] = engine.run([JOB])
    assert after.error is None
    assert after.tokens == before.tokens


def put_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def put_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def put_deep(file: Path) -> None:
    text = b"[" * 100_000
    file.write_bytes(len(text).to_bytes(8, "little") + text)


def put_long(file: Path) -> None:
    """A header that claims to be as long as no file is."""
    file.write_bytes(b"\xff" * 100)


ODD: dict[str, Callable[[Path], None]] = {
    "a pipe": put_pipe,
    "a directory": put_directory,
    "nested deep": put_deep,
    "a long header": put_long,
}


CASES = [
    *((kind, "layer.1.safetensors") for kind in ODD),
    ("a pipe", "manifest.json"),
    ("nested deep", "manifest.json"),
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_damaged_kept_weights_are_made_anew(
    kind: str, name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def answer() -> Any:
        with Engine.from_pretrained(str(model), policy={"device": "cpu", "compress-weight": 4}) as engine:
            [done] = engine.run([JOB])
            engine.wait_until_loaded()
        return done.tokens, done.prompt_logprobs

    first = answer()
    (folder,) = (tmp_path / "cache" / "flexgen-helm" / "weights").iterdir()
    good = {file.name: file.read_bytes() for file in folder.iterdir()}
    ODD[kind](folder / name)
    if name == "manifest.json":  # it is written when something else is
        (folder / "layer.1.safetensors").unlink()
    assert answer() == first
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == good
    told = [record.getMessage() for record in caplog.records if record.name.startswith("engine")]
    assert len(told) == (name != "manifest.json")


def test_another_model_s_damaged_manifest_does_not_matter(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number, content in enumerate(["[" * 100_000, "[]", "3", "{", json.dumps({"source": []}), '"\\ud800"']):
        folder = tmp_path / "cache" / "flexgen-helm" / "weights" / f"other-{number}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(content)
    odd = folder.with_name("odd")
    odd.mkdir()
    os.mkfifo(odd / "manifest.json")
    with Engine.from_pretrained(str(model), policy={"device": "cpu", "compress-weight": 4}) as engine:
        [done] = engine.run([JOB])
    assert done.error is None


def test_a_checkpoint_that_is_refused_is_not_held_open(model: Path) -> None:
    opened = CausalModel(model, torch.float32, torch.device("cpu"))
    state = load_file(model / WEIGHTS)
    del state["model.norm.weight"]
    save_file(state, model / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks? 1 of"):
        UnitValues(model, opened)
    held = [os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    assert [name for name in held if name.startswith(str(model))] == []
