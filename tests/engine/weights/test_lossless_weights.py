"""Protects: under `compress-weight: lossless` layers compute with the checkpoint's very bits, wherever they lie."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loras
import pytest
import torch
from parity import JOBS, POLICIES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine import Engine, Policy
from engine.checkpoint.description import describe
from engine.checkpoint.identity.result import result_identity
from engine.errors import UnsupportedError
from engine.model.causal_model import CausalModel
from engine.model.experts.interface import stack_of
from engine.weights.encoded.kept import weights_directory
from engine.weights.encoded.left_plain import left_plain
from engine.weights.store import WeightStore

LOSSLESS = {"compress-weight": "lossless"}
HEAVY = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where weights are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def heavy(build: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint one of whose matrices has numbers of 100 exponents, all as common."""
    path = Path(shutil.copytree(build("llama"), tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    like, random = tensors[HEAVY], torch.Generator().manual_seed(0)
    sizes = 2.0 ** torch.randint(-104, -4, like.shape, generator=random)
    tensors[HEAVY] = (torch.randn(like.shape, generator=random) * sizes).to(like.dtype)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def settings(policy: str, tmp_path: Path, **others: Any) -> dict[str, Any]:
    return {**POLICIES[policy], "device": "cpu", "dtype": "bfloat16", "offload-dir": str(tmp_path / "off"), **others}


def answers(model: Path, policy: dict[str, Any]) -> list[Any]:
    with Engine.from_pretrained(str(model), policy=policy) as engine:
        done = engine.run(JOBS)
        engine.wait_until_loaded()
    assert all(each.error is None for each in done)
    return [(each.tokens, each.logprobs, each.prompt_logprobs) for each in done]


def expect_bits_of(model: Path, policy: dict[str, Any]) -> frozenset[str]:
    """What layers and head compute with are transformers' own bits; returns the names of what is encoded."""
    state = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).state_dict()
    coded: frozenset[str] = frozenset()
    with Engine.from_pretrained(str(model), policy=policy) as engine:
        engine.wait_until_loaded()
        parts = engine.parts
        for step, unit in enumerate([f"layer.{index}" for index in range(len(parts.model.layers))] + ["head"]):
            parts.stream.acquire(step)
            placed = parts.weights.placed.get(unit)
            for name, (module, attribute) in placed.unit.owners.items() if placed is not None else ():
                found = module._parameters[attribute]
                if name in placed.stacks:
                    stack = stack_of(module, attribute)
                    found = torch.cat([stack.take(*group).clone() for group in stack.groups()])
                assert found.flatten().view(torch.int16).equal(state[name].flatten().view(torch.int16)), name
            coded |= frozenset() if placed is None else placed.coded
            parts.stream.release(step)
        stored = sum(sum(tiers.values()) for tiers in parts.weights.placed_bytes().values())
        assert stored < sum(tensor.nbytes for tensor in parts.model.state.values())
    return coded


@pytest.mark.parametrize(
    ("family", "policy"), [("llama", "thirds"), ("gpt2", "20-80"), ("qwen3-moe", "thirds"), ("mixtral", "device")]
)
def test_layers_have_the_checkpoints_bits_and_answers_are_as_without(
    family: str, policy: str, build: Callable[[str], Path], tmp_path: Path
) -> None:
    plain = settings(policy, tmp_path)
    coded = expect_bits_of(build(family), plain | LOSSLESS)
    assert any(name.endswith(("down_proj.weight", "down_proj", "c_proj.weight")) for name in coded)
    assert not any("norm" in name or "embed" in name or name.endswith("bias") for name in coded)
    assert answers(build(family), plain | LOSSLESS) == answers(build(family), plain)


def test_a_matrix_with_too_many_escapes_stays_as_it_is(heavy: Path, tmp_path: Path) -> None:
    coded = expect_bits_of(heavy, settings("host", tmp_path, **LOSSLESS))
    assert HEAVY not in coded
    assert HEAVY.replace("layers.1", "layers.0") in coded
    assert "lm_head.weight" in coded


def test_rows_that_nothing_was_trained_with_are_seen(build: Callable[[str], Path], tmp_path: Path) -> None:
    """One in forty of a head, side by side."""
    path = Path(shutil.copytree(build("llama"), tmp_path / "model"))
    tensors, random = load_file(path / "model.safetensors"), torch.Generator().manual_seed(0)
    head = 0.02 * torch.randn(32_000, 64, generator=random)
    head[1000:1800] *= 2.0 ** torch.randint(-80, -40, (800, 64), generator=random)
    tensors |= dict.fromkeys(("lm_head.weight", "model.embed_tokens.weight"), head.to(torch.bfloat16))
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": len(head)}))
    assert left_plain(path, CausalModel(path, torch.bfloat16, torch.device("cpu"))) == {"lm_head.weight"}


def test_an_adapters_own_matrices_are_not_sampled(build: Callable[[str], Path], tmp_path: Path) -> None:
    """Their numbers are of other sizes than the matrix that their product is added to, which is what is encoded."""
    lora = loras.save_adapter(tmp_path / "lora", build("llama"))
    state = load_file(lora / "adapter_model.safetensors")
    for tensor in state.values():
        tensor *= 2.0 ** torch.linspace(-80, -40, tensor.shape[0])[:, None]
    save_file(state, lora / "adapter_model.safetensors", metadata={"format": "pt"})
    path = Path(describe(str(lora)).path)
    assert left_plain(path, CausalModel(path, torch.bfloat16, torch.device("cpu"))) == frozenset()


def test_what_a_sample_does_not_show_is_refused_in_one_line(
    heavy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.opening.left_plain", lambda path, model: frozenset())
    message = rf"compress-weight: lossless: {HEAVY} has [\d,]+ of 8,192 numbers .* room for 25; leave"
    with pytest.raises(UnsupportedError, match=message):
        answers(heavy, settings("host", tmp_path, **LOSSLESS))


def test_the_next_start_reads_what_was_kept(
    build: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a parameter came from the checkpoint")

    policy = settings("20-80", tmp_path, **LOSSLESS)
    before = answers(build("qwen3-moe"), policy)
    (folder,) = weights_directory().iterdir()
    assert "-lossless-bfloat16-" in folder.name
    monkeypatch.setattr(WeightStore, "put", refuse)
    assert answers(build("qwen3-moe"), policy) == before


@pytest.mark.parametrize("policy", ["20-80", "disk"])
def test_verification_finds_no_difference(policy: str, build: Callable[[str], Path], tmp_path: Path) -> None:
    with Engine.from_pretrained(str(build("llama")), policy=settings(policy, tmp_path, **LOSSLESS)) as engine:
        found = engine.compare_with_stock(JOBS[:3], engine.run(JOBS[:3]))
    assert all(stage.weights is not None and stage.weights.largest == 0 for stage in found.stages)
    assert found.unencoded is None


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_are_refused(dtype: str, build: Callable[[str], Path]) -> None:
    message = rf"compress-weight: lossless takes bfloat16, and the model is computed in {dtype}; leave it out, or set"
    with pytest.raises(UnsupportedError, match=message):
        Engine.from_pretrained(str(build("opt")), policy={"device": "cpu", "dtype": dtype, **LOSSLESS})


def test_an_answers_identity_is_the_plain_one(build: Callable[[str], Path]) -> None:
    plain = {"device": "cpu", "dtype": "bfloat16"}
    model = str(build("llama"))
    policies = (plain, plain | LOSSLESS, plain | {"compress-weight": 8})
    found = [result_identity(model, Policy.from_mapping(policy)) for policy in policies]
    assert found[0] == found[1] != found[2]
