"""Protects: a window is what transformers can run without a result that depends on its company, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
from transformers import AutoModelForCausalLM

from engine import Engine, Job
from engine.checkpoint.description import describe, with_window
from engine.checkpoint.window import longest_window, window_of
from engine.errors import ConfigError

PROMPT = [(7 * i) % 400 + 20 for i in range(150)]


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"max_position_embeddings": 64, "rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


PUBLISHED: dict[str, tuple[dict[str, Any], int | None]] = {
    "vicuna-13b-v1.5-16k": (
        {"max_position_embeddings": 4096, "rope_scaling": {"factor": 4.0, "type": "linear"}},
        16384,
    ),
    "Qwen2.5 with YaRN": (
        {
            "max_position_embeddings": 32768,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
        131072,
    ),
    "Qwen3 with YaRN": (
        {
            "max_position_embeddings": 40960,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
        131072,
    ),
    "DeepSeek-V3": (
        {
            "max_position_embeddings": 163840,
            "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
        },
        163840,
    ),
    "Llama-3.1": (
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
        },
        131072,
    ),
    "Phi-3-mini-128k": (
        {
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]},
        },
        4096,
    ),
    "dynamic": ({"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, 4096),
    "Gemma 3": (
        {
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_type": "default"},
            },
        },
        131072,
    ),
    "OPT": ({"max_position_embeddings": 2048}, 2048),
    "no limit": ({"max_position_embeddings": 10**12}, None),
    "none told": ({}, None),
    "scaling that cannot be meant": ({"max_position_embeddings": 64, "rope_scaling": "linear"}, 64),
    "a factor that cannot be meant": (
        {"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": "4"}},
        64,
    ),
}
"""Fields of config.json as they are published, and the windows that their authors name."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_windows_of_published_configs(name: str) -> None:
    config, window = PUBLISHED[name]
    assert window_of(config) == window


SCALED = {
    "linear": rope("linear", factor=4.0),
    "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=64),
    "yarn, original left out": rope("yarn", factor=4.0),
}


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_tables_are_run_as_far_as_they_reach(kind: str, tmp_path: Path) -> None:
    """A prompt of more than the first window, beside a short one, as transformers runs each alone."""
    path = models.save_model(tmp_path, "llama", **SCALED[kind])
    assert describe(str(path)).window == 256
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    prompts = [PROMPT, PROMPT[:20]]
    with Engine.from_pretrained(str(path), policy={"device": "cpu"}) as engine:
        done = engine.run([Job(prompt=prompt, max_new_tokens=0, prompt_logprobs=True) for prompt in prompts])
    for prompt, each in zip(prompts, done, strict=True):
        assert each.prompt_logprobs is not None
        assert each.prompt_logprobs[1:] == pytest.approx(models.reference_logprobs(model, prompt), abs=1e-4)


def test_a_window_may_be_lowered_and_raised(tmp_path: Path) -> None:
    path = models.save_model(tmp_path, "llama", max_position_embeddings=64)
    job = Job(prompt=PROMPT, max_new_tokens=0, prompt_logprobs=True)
    for window, is_run in ((None, False), (148, False), (149, True), (10**6, True)):
        with Engine.from_pretrained(str(path), policy={"device": "cpu"}, window=window) as engine:
            assert engine.window == (window or 64)
            [done] = engine.run([job])
        assert (done.error is None) == is_run
    expected = models.reference_logprobs(AutoModelForCausalLM.from_pretrained(path).eval(), PROMPT)
    assert done.prompt_logprobs is not None
    assert done.prompt_logprobs[1:] == pytest.approx(expected, abs=1e-4)


def test_a_config_may_name_any_length(tmp_path: Path) -> None:
    path = models.save_model(tmp_path, "llama", max_position_embeddings=10**12)
    assert describe(str(path)).window is None


@pytest.mark.parametrize("window", [0, -1, True, 1.5, "64"])
def test_a_window_that_is_no_length_is_refused(window: Any, tmp_path: Path) -> None:
    description = describe(str(models.save_model(tmp_path, "llama")))
    with pytest.raises(ConfigError, match="is not a number of at least 1"):
        with_window(description, window)


ENDING = {
    "learned positions": ("opt", {}),
    "a table made beforehand": ("gptj", {}),
    "dynamic": ("llama", rope("dynamic", factor=4.0)),
}


@pytest.mark.parametrize("kind", ENDING)
def test_a_window_ends_with_the_positions(kind: str, tmp_path: Path) -> None:
    family, changes = ENDING[kind]
    description = describe(str(models.save_model(tmp_path, family, **changes)))
    longest = description.window
    assert longest is not None
    assert with_window(description, longest - 1).window == longest - 1
    with pytest.raises(ConfigError, match=rf"window {longest + 1} of .* is more than {longest}"):
        with_window(description, longest + 1)


def test_longrope_ends_at_the_original_window() -> None:
    config, window = PUBLISHED["Phi-3-mini-128k"]
    assert longest_window(config, is_rotary=True) == window == 4096


def test_a_pad_beyond_the_window_is_refused(tmp_path: Path) -> None:
    path = models.save_model(tmp_path, "llama")
    with pytest.raises(ConfigError, match=r"pad-to-seq-len 129 is more than the model's window of 128"):
        Engine.from_pretrained(str(path), policy={"device": "cpu", "pad-to-seq-len": models.WINDOW + 1})
