"""Protects: the text of multimodal checkpoints is computed as by the published class, from the language half alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from engine import Engine, Job
from engine.errors import CheckpointError

PROMPT = [3 + (37 * at * at + 11 * at) % 480 for at in range(29)]
STREAMED = {"device": "cpu", "percent": [0, 100, 0, 100, 0, 100]}


def scores(directory: Path, prompt: list[int]) -> list[float | None]:
    """Log-probabilities of a prompt, with an embedding whose rows are looked up one by one."""
    with Engine.from_pretrained(str(directory), policy=STREAMED) as engine:
        assert not [name for name in engine.parts.model.state if "vision" in name]
        (done,) = engine.run([Job(prompt=prompt, max_new_tokens=0, prompt_logprobs=True)])
    assert done.error is None
    assert done.prompt_logprobs is not None
    return list(done.prompt_logprobs[1:])


def edit(directory: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def keep(directory: Path, wanted: Callable[[str], bool]) -> None:
    file = directory / "model.safetensors"
    save_file({name: x for name, x in load_file(file).items() if wanted(name)}, file, metadata={"format": "pt"})


def is_language(name: str) -> bool:
    return "vision" not in name and "projector" not in name and "visual" not in name


@pytest.fixture(scope="module", params=["mistral3", "qwen3_vl"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A checkpoint with an encoder, and plain transformers on it."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    directory = models.save_random(folder, models.small_config_of(request.param))
    return directory, models.load_reference(directory)


@pytest.mark.parametrize("has_encoder", [True, False])
def test_a_config_of_the_text_half_alone(
    has_encoder: bool, whole: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    """Under the whole checkpoint's names; "mistral" has a causal class, and "qwen3_vl_text" has none."""
    source, reference = whole
    directory = shutil.copytree(source, tmp_path / "half")
    edit(directory, lambda config: {**config["text_config"], "tie_word_embeddings": config["tie_word_embeddings"]})
    if not has_encoder:
        keep(directory, is_language)
    assert scores(directory, PROMPT) == pytest.approx(models.reference_logprobs(reference, PROMPT), abs=1e-4, rel=0)


def test_encoders_need_no_weights(whole: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    source, reference = whole
    directory = shutil.copytree(source, tmp_path / "without")
    keep(directory, is_language)
    assert scores(directory, PROMPT) == pytest.approx(models.reference_logprobs(reference, PROMPT), abs=1e-4, rel=0)


def test_a_checkpoint_without_its_language_half_is_refused(whole: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    directory = shutil.copytree(whole[0], tmp_path / "encoder")
    keep(directory, lambda name: not is_language(name))
    with pytest.raises(CheckpointError, match=r"the weight files lack all \d+ of the language model, e\.g\."):
        Engine.from_pretrained(str(directory), policy=STREAMED)


def test_tokens_that_stand_for_images_are_embedded_as_the_model_does(tmp_path: Path) -> None:
    """Gemma 4 embeds padding in their place: rows that nobody asked to be looked up."""
    directory = models.save_model(tmp_path, "gemma4-multimodal", image_token_id=PROMPT[5])
    assert directory.name == tmp_path.name
    reference = models.load_reference(directory)
    assert scores(directory, PROMPT) == pytest.approx(models.reference_logprobs(reference, PROMPT), abs=1e-4, rel=0)
