"""Protects: a model that cannot be opened is refused by `register` and `run` beforehand, in the words of opening it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import RwkvConfig, RwkvForCausalLM

from engine import Engine, EngineError
from flexgen_helm.run import main


def edit(model: Path, **changes: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def with_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def become_rwkv(model: Path) -> None:
    config = RwkvConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, context_length=512)
    RwkvForCausalLM(config).save_pretrained(model)
    edit(model, max_position_embeddings=512)


KEY = "model.layers.1.mlp.up_proj.weight"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a family that keeps a state by itself": (become_rwkv, "keep a state that no cache"),
    "an unknown quantization": (
        lambda model: edit(model, quantization_config={"quant_method": "quip"}),
        "quantized by quip",
    ),
    "codes without a scale": (
        lambda model: with_tensors(model, lambda found: found.update({KEY: found[KEY].to(torch.float8_e4m3fn)})),
        "is stored as float8_e4m3fn",
    ),
    "a parameter that is not there": (
        lambda model: with_tensors(model, lambda found: found.pop(KEY)),
        "lack 1 of",
    ),
    "a table of another size": (
        lambda model: with_tensors(model, lambda found: found.update({KEY: found[KEY][:-1].contiguous()})),
        "do not belong together",
    ),
    "an activation that there is not": (lambda model: edit(model, hidden_act="none such"), "cannot build this model"),
    "an end of text that is none": (
        lambda model: (model / "generation_config.json").write_text('{"eos_token_id": "</s>"}'),
        "eos_token_id",
    ),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_model_is_refused_beforehand_in_the_words_of_its_opening(
    kind: str, tmp_path: Path, tiny_llama: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change, reason = FAULTS[kind]
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    change(model)
    with pytest.raises(EngineError) as opened:
        Engine.from_pretrained(str(model), {"device": "cpu"})
    assert reason in str(opened.value)
    entry = "mmlu:subject=anatomy,data_augmentation=canonical"
    for arguments in (["register", str(model)], ["run", "-r", entry, "--model", str(model), "--suite", "s"]):
        assert main(arguments) == 2
        assert str(opened.value) in capfd.readouterr().err.splitlines()[-1]
        assert sorted(each.name for each in tmp_path.iterdir()) == ["model"]


def test_what_a_tokenizer_says_of_itself_is_cut(
    tmp_path: Path, tiny_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its library repeats whole values of the file."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    told = json.loads((model / "tokenizer.json").read_text())
    told["model"]["vocab"]["x"] = "y" * 5000
    (model / "tokenizer.json").write_text(json.dumps(told))
    assert main(["register", str(model), "--local-path", str(tmp_path / "local")]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "tokenizer" in line
    assert len(line) < 1000


def test_a_policy_that_the_model_cannot_follow_is_refused_too(
    tmp_path: Path, tiny_llama: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("compress-cache: 4\n")
    with pytest.raises(EngineError, match="compress-cache: keys and values of layer 0") as opened:
        Engine.from_pretrained(str(tiny_llama), {"device": "cpu", "compress-cache": 4})
    assert main(["register", str(tiny_llama), "--policy", "mine.yaml"]) == 2
    assert str(opened.value) in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "prod_env").exists()
