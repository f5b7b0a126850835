"""Protects: the sizes that are shipped are those of the models, and planning with them needs no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flexgen_helm.planning.dummy import shape_model
from flexgen_helm.planning.model_sizes import ModelSizes, shipped_sizes
from flexgen_helm.planning.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[3]
QUICK = ("opt-125m", "opt-30b", "qwen3-30b-a3b")
"""Few layers, more of them, and experts; the others are of the same families, or large."""
PUBLISHED = {
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.55,
    "qwen3-30b-a3b": 30.53,
    "mixtral-8x7b": 46.70,
    "gemma-4-31b": 30.7,
}
"""Parameters in billions, as the models' own pages or papers have them."""
BYTES = {
    "gpt-oss-20b": (13_761_264_768, 0.0),
    "gpt-oss-120b": (65_248_815_744, 0.0),
    "deepseek-v3": (688_586_727_753 - 11_515_616_512 - 2 * 1_853_358_080, 1e-4),
    "kimi-k2": (594e9, 2e-3),
    "qwen3-next-80b-a3b": (82.1e9 - 1.68e9, 2e-3),
}
"""Bytes of the tensors of published checkpoints, and how exactly they are known: total_size of the indices of gpt-oss;
the files of DeepSeek-V3 less its layer for a second token, which repeats embedding and head; the files of
Kimi-K2-Thinking, to a gigabyte; those of Qwen3-Next-80B-A3B-Instruct-FP8, to a tenth, less its layer for a second
token: 512 experts of 3 x 512 x 2048, attention and two matrices of 2048 x 2048."""


@pytest.mark.parametrize(
    "shape", [*QUICK, *(pytest.param(each, marks=pytest.mark.slow) for each in SHAPES if each not in QUICK)]
)
def test_shipped_sizes_are_those_of_the_model(shape: str, tmp_path: Path) -> None:
    built = ModelSizes.of(shape_model(shape, "bfloat16", tmp_path))
    assert ModelSizes.from_mapping(json.loads(json.dumps(built.as_mapping()))) == built
    assert shipped_sizes(shape, "bfloat16") == built
    rounded = {codes: each for codes, each in built.coded.items() if codes[0] != "lossless"}
    assert shipped_sizes(shape, "float16") == replace(built, coded=rounded)
    assert len(rounded) < len(built.coded)
    assert shipped_sizes(shape, "float32") is None


@pytest.mark.parametrize(("shape", "billions"), PUBLISHED.items())
def test_shipped_sizes_have_the_published_number_of_parameters(shape: str, billions: float) -> None:
    """Routers' float32 parameters count twice here: 0.02 % of them all."""
    sizes = shipped_sizes(shape, "bfloat16")
    assert sizes is not None
    assert sum(sizes.coded[None, None].stored.values()) / 2e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize("shape", BYTES)
def test_shipped_sizes_have_the_published_number_of_bytes(shape: str) -> None:
    """What crosses the link is what is published."""
    sizes = shipped_sizes(shape, "bfloat16")
    assert sizes is not None
    expected, apart = BYTES[shape]
    assert sum(sizes.coded[None, None].stored.values()) == pytest.approx(expected, rel=apart, abs=0)
    assert not sizes.can_encode_weights


def test_a_plan_for_a_shipped_shape_and_profile_imports_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from flexgen_helm.run import main;"
        "code = main(['plan', '--shape', 'opt-30b', '--hardware', 't4', '--allow-compression']);"
        "print(code, [name for name in ('torch', 'transformers', 'helm') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"
