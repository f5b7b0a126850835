"""Protects: what a family asks of attention is honoured as plain transformers does it, or refused for its reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from engine import Engine, Job
from engine.batch.reach import Reach
from engine.errors import UnsupportedError
from engine.model.attention import interface
from engine.model.attention.dense import Dense
from engine.model.attention.mask import reach_of
from engine.model.attention.rule import products
from engine.model.causal_model import CausalModel
from engine.model.undrivable import UndrivableError

CPU = torch.device("cpu")


class TestMasks:
    """transformers' own mask functions are what they are called."""

    def test_causal(self) -> None:
        assert reach_of(masking_utils.causal_mask_function) == Reach()

    @settings(deadline=None, max_examples=25)
    @given(window=st.integers(1, 140_000))
    def test_windows_of_any_size(self, window: int) -> None:
        assert reach_of(masking_utils.sliding_window_causal_mask_function(window)) == Reach(window)

    @settings(deadline=None, max_examples=25)
    @given(chunk=st.integers(2, 140_000))
    def test_chunks_of_any_size(self, chunk: int) -> None:
        function = masking_utils.chunked_causal_mask_function(chunk, torch.zeros(1, dtype=torch.long))
        assert reach_of(function) == Reach(chunk=chunk)

    @pytest.mark.parametrize(
        ("function", "why"),
        [
            (masking_utils.bidirectional_mask_function, "attend to later ones"),
            (masking_utils.sliding_window_bidirectional_mask_function(8), "attend to later ones"),
            (
                masking_utils.or_masks(
                    masking_utils.causal_mask_function,
                    masking_utils.blockwise_overlay(torch.tensor([[0, 0, 1, 1]])),
                ),
                "depends on more than positions",
            ),
            (lambda batch, head, query, key: (key <= query) & (key % 2 == 0), "a mask of its own"),
            (lambda batch, head, query, key: (key <= query) & ((query - key < 8) | (key < 2)), "a mask of its own"),
        ],
    )
    def test_others_are_refused(self, function: Any, why: str) -> None:
        with pytest.raises(UndrivableError, match=why):
            reach_of(function)


def opened(tmp_path: Path, family: str, **changes: Any) -> CausalModel:
    return CausalModel(models.save_model(tmp_path, family, **changes), torch.float32, CPU)


@pytest.mark.parametrize(
    ("family", "windows"),
    [
        ("phimoe", [8, 8, 8]),
        ("qwen2-moe-window", [8, None, None]),
        ("gemma3", [8, None, 8]),
        ("llama", [None, None, None]),
    ],
)
def test_layers_follow_the_masks_they_get(family: str, windows: list[int | None], tmp_path: Path) -> None:
    assert [reach.window for reach in opened(tmp_path, family).sweeping.reaches.values()] == windows


def test_attention_to_later_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="attend to later ones"):
        opened(tmp_path, "gemma3", use_bidirectional_attention=True)


def edited(tmp_path: Path, edit: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch) -> CausalModel:
    """A Llama that `edit` has changed before it is taken apart."""
    build = CausalModel._built

    def build_edited(path: Path, dtype: torch.dtype) -> Any:
        model = build(path, dtype)
        edit(model)
        return model

    monkeypatch.setattr(CausalModel, "_built", staticmethod(build_edited))
    return opened(tmp_path, "llama")


def test_what_is_computed_between_layers_is_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Halved(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            output: torch.Tensor = self.layer(hidden, *args, **kwargs)
            return output * 0.5

    class Halving(nn.ModuleList):
        def __getitem__(self, index: Any) -> Any:
            found = super().__getitem__(index)
            return [Halved(layer) for layer in found] if isinstance(index, slice) else found

    def halve(model: Any) -> None:
        model.model.layers = Halving(model.model.layers)

    with pytest.raises(UnsupportedError, match=r"changes the hidden states between layers 0 and 1"):
        edited(tmp_path, halve, monkeypatch)


def test_layers_that_run_twice_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loop(model: Any) -> None:
        class Looping(nn.ModuleList):
            def __getitem__(self, index: Any) -> Any:
                found = super().__getitem__(index)
                return [*found, *found] if isinstance(index, slice) else found

        model.model.layers = Looping(model.model.layers)

    with pytest.raises(UnsupportedError, match=r"calls layer 0 where layer 3 comes next"):
        edited(tmp_path, loop, monkeypatch)


def test_a_module_that_two_layers_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def share(model: Any) -> None:
        model.model.layers[2].mlp = model.model.layers[0].mlp

    with pytest.raises(UnsupportedError, match=r"layers 0 and 2 share a LlamaMLP"):
        edited(tmp_path, share, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scores_are_the_exact_products(dtype: torch.dtype) -> None:
    query, key = (torch.randn(2, 3, 5, 16, dtype=dtype) * 300 for _ in range(2))
    found = products(query, key)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (query.double() @ key.double().mT).float(), rtol=1e-5, atol=0.1)
    assert found.abs().max() > torch.finfo(torch.float16).max


@pytest.mark.parametrize(("scale", "percent"), [(9e4, [100, 0, 100, 0, 100, 0]), (1e6, [20, 80, 0, 100, 0, 100])])
def test_scores_beyond_the_range_of_float16_fail_no_job(
    scale: float, percent: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases as large as Qwen2's, in float16, without FlashAttention: products of queries and keys reach `scale`."""
    monkeypatch.setattr(interface, "BACKENDS", (Dense(),))
    path = models.save_model(tmp_path, "qwen2", dtype="float16")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16)
    with torch.no_grad():
        for layer in model.model.layers:  # one number of a head on either side
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj):
                projection.bias.view(-1, attention.head_dim)[:, -1] = scale**0.5
    model.save_pretrained(path)
    prompt = list(range(5, 35))
    assert model(torch.tensor([prompt])).logits.isfinite().all()  # transformers computes it
    with Engine.from_pretrained(str(path), policy={"device": "cpu", "dtype": "float16", "percent": percent}) as engine:
        scored = engine.run([Job(prompt=prompt, max_new_tokens=4, prompt_logprobs=True)] * 3)
    assert [done.error for done in scored] == [None] * 3


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_float16_without_flash_attention_is_near_float32(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of cards before sm80, a T4 for one."""
    monkeypatch.setattr(interface, "BACKENDS", (Dense(),))
    path = models.save_model(tmp_path, family)
    reference = models.load_reference(path)
    prompts = [[*range(5, 29), *range(100 + n, 105 + n)] for n in range(3)]
    with Engine.from_pretrained(str(path), policy={"device": "cpu", "dtype": "float16"}) as engine:
        done = engine.run([Job(prompt=prompt, max_new_tokens=6, prompt_logprobs=True) for prompt in prompts])
    for prompt, completion in zip(prompts, done, strict=True):
        expected = models.reference_logprobs(reference, [*prompt, *completion.tokens])
        assert completion.prompt_logprobs is not None
        assert [*completion.prompt_logprobs[1:], *completion.logprobs] == pytest.approx(expected, abs=2e-2)


def test_a_looped_family_is_refused_beforehand(tmp_path: Path) -> None:
    path = models.save_model(tmp_path, "llama")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model("dory", **sizes, vocab_size=models.VOCABULARY, architectures=["DoryForCausalLM"])
    config.save_pretrained(path)
    with pytest.raises(UnsupportedError, match="do not run once each"):
        CausalModel(path, torch.float32, CPU)


@pytest.mark.parametrize(("rows_meet", "told"), [(False, None), (True, "mix tokens outside their attention")])
def test_rows_meet_in_attention_alone(
    rows_meet: bool, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever mixes rows beside attention would make results depend on what is computed in the same call."""

    class Centred(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden - hidden.mean(1, keepdim=True) if rows_meet else hidden * 2

    def centre(model: Any) -> None:
        model.model.layers[1].mlp = Centred()

    if told is None:
        assert not edited(tmp_path, centre, monkeypatch).is_padded
        return
    with pytest.raises(UnsupportedError, match=told):
        edited(tmp_path, centre, monkeypatch)


@pytest.mark.parametrize("hidden_size", [64, 1024])
def test_a_router_that_mixes_rows_is_refused(hidden_size: int, tmp_path: Path) -> None:
    """Doge's: whether its matrices are small enough for random numbers or not."""
    config = AutoConfig.for_model(
        "doge",
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=models.VOCABULARY,
        is_moe=True,
        num_experts=64,
        num_experts_per_tok=8,
        architectures=["DogeForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="mix tokens outside their attention"):
        CausalModel(tmp_path, torch.float32, CPU)
