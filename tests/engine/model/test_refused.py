"""Protects: families that cannot run are refused by name, in one line, before their weights are read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import save_file

from engine import Engine
from engine.checkpoint.description import describe
from engine.errors import UnsupportedError

STATE: dict[str, tuple[str, dict[str, Any]]] = {
    "rwkv": ("RwkvForCausalLM", {"attention_hidden_size": 64}),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", {}),
}
"""Model type -> class in its config.json, and what its config must say at tiny sizes."""
NOT_CAUSAL: dict[str, tuple[str, str]] = {
    "t5": ("T5ForConditionalGeneration", "encoder-decoder"),
    "bart": ("BartForConditionalGeneration", "encoder-decoder"),
    "bert": ("BertForMaskedLM", "not a causal language model"),
    "roberta": ("RobertaForMaskedLM", "not a causal language model"),
}
"""Model type -> class in its config.json, and why it is refused."""


DOCUMENT = Path(__file__).parents[3] / "docs" / "families.md"


def directory_of(folder: Path, model_type: str, architecture: str, changes: dict[str, Any]) -> Path:
    """A model directory that is whole but for its weights: reading them would end in another error."""
    config = models.small_config_of(model_type, **changes)
    config.architectures = [architecture]
    config.save_pretrained(folder)
    models.make_tokenizer().save_pretrained(folder)
    save_file({"unread": torch.zeros(1)}, folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["model_type"] == model_type
    return folder


def refusal(directory: Path, offload: Path) -> str:
    policy = {"device": "cpu", "percent": [0, 0, 0, 0, 0, 0], "offload-dir": str(offload)}
    with pytest.raises(UnsupportedError) as caught:
        Engine.from_pretrained(str(directory), policy=policy)
    assert type(caught.value) is UnsupportedError
    assert "\n" not in str(caught.value)
    assert not offload.exists() or list(offload.iterdir()) == []
    return str(caught.value)


@pytest.mark.parametrize("model_type", list(STATE))
def test_a_model_that_keeps_a_state_by_itself_is_refused(model_type: str, tmp_path: Path) -> None:
    architecture, changes = STATE[model_type]
    message = refusal(directory_of(tmp_path / "model", model_type, architecture, changes), tmp_path / "offload")
    assert f"{architecture} ({model_type})" in message
    assert re.search("keep a state that no cache of transformers' holds|mix tokens outside their attention", message)
    assert "cannot be run here" in message


@pytest.mark.parametrize("model_type", list(NOT_CAUSAL))
def test_what_is_not_decoder_only_is_refused(model_type: str, tmp_path: Path) -> None:
    """Already where nothing but the directory is looked at."""
    architecture, reason = NOT_CAUSAL[model_type]
    directory = directory_of(tmp_path / "model", model_type, architecture, {})
    message = refusal(directory, tmp_path / "offload")
    for part in (architecture, str(directory), reason, "only", "decoder-only"):
        assert part in message
    with pytest.raises(UnsupportedError):
        describe(str(directory))


def test_the_document_lists_what_is_refused() -> None:
    table = DOCUMENT.read_text(encoding="utf-8").split("## Refused")[1]
    listed = {name for line in table.splitlines() if line.startswith("| `") for name in re.findall("`(.+?)`", line)}
    assert listed >= {*STATE, *NOT_CAUSAL}
