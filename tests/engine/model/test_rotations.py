"""Protects: a function is taken for a rotary embedding only if it computes one, and only our layers get the kernel."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.models.llama import modeling_llama

from engine.kernels import compiled
from engine.kernels.elementwise.rotations import rotated
from engine.model.causal_model import CausalModel
from engine.model.fused import rotations
from engine.model.fused.rotations import numbers_per_pair
from engine.model.fused.row_kernel import RowKernel
from engine.model.stock import StockForward
from engine.model.sweep_context import SweepContext

DTYPE = torch.bfloat16


@pytest.mark.parametrize(
    ("family", "per_pair"),
    [("llama", 2), ("qwen3_moe", 2), ("gpt_neox", 2), ("phi3", 2), ("gpt_oss", 1), ("cohere", None), ("glm4", None)],
)
def test_rotations_of_transformers_are_known_by_what_they_compute(family: str, per_pair: int | None) -> None:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    assert numbers_per_pair(module.apply_rotary_pos_emb, DTYPE) == per_pair


def test_others_are_not_taken_for_one() -> None:
    Pair = tuple[torch.Tensor, torch.Tensor]

    def other_way(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        return rotated(q, k, cos, -sin)

    def wide(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        found = rotated(q.float(), k.float(), cos.float(), sin.float())
        return found[0].to(q.dtype), found[1].to(k.dtype)

    def only_queries(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        return rotated(q, k, cos, sin)[0], k

    def last_part(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        width = cos.shape[-1]
        found = rotated(q[..., -width:], k[..., -width:], cos, sin)
        return torch.cat((q[..., :-width], found[0]), -1), torch.cat((k[..., :-width], found[1]), -1)

    def other_half(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        return rotated(q, k, torch.cat((cos, sin), -1), torch.cat((sin, sin), -1))

    others = other_way, wide, only_queries, last_part, other_half, modeling_llama.rotate_half, torch.add
    assert [numbers_per_pair(each, DTYPE) for each in others] == [None] * len(others)


def test_only_layers_of_ours_are_changed(build: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    before = modeling_llama.apply_rotary_pos_emb

    def kernel(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, per_pair: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(q.shape[2])
        return rotated(q, k, cos, sin, per_pair)

    monkeypatch.setattr(rotations, "kernel_for", lambda device: kernel)
    monkeypatch.setattr(compiled, "is_there", lambda rows: rows.device.type == "cpu")
    model = CausalModel(build("llama"), DTYPE, torch.device("cpu"))
    opened = len(calls)  # its layers were called with rows, to see if these meet
    assert modeling_llama.apply_rotary_pos_emb is before
    attention = model.layers[0].self_attn
    for module in attention.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                values = torch.randn(parameter.shape).to(DTYPE) / 8
                module._parameters[name] = torch.nn.Parameter(values, requires_grad=False)
    rows, angles = torch.randn(1, 7, 64).to(DTYPE), torch.randn(1, 7, 16)
    called = {"position_embeddings": (angles.cos().to(DTYPE), angles.sin().to(DTYPE)), "attention_mask": None}
    with StockForward(model).attending():
        expected = attention(rows, **called)[0]
    assert len(calls) == opened
    monkeypatch.setattr(attention.config, "_attn_implementation", "sdpa")
    assert torch.equal(attention(rows, **called)[0], expected)
    assert calls[opened:] == [7]


def test_a_call_in_another_form_goes_to_the_families_own_function() -> None:
    def plain(q: torch.Tensor, k: torch.Tensor | None = None, **named: torch.Tensor) -> tuple[torch.Tensor, int]:
        return q, len(named) + 10 * (k is not None)

    kept, states = SweepContext(), torch.randn(1, 2, 3, 4).to(DTYPE)
    kernel = RowKernel(rotated, is_on_host=False)
    assert rotations._rotated(plain, kernel, kept, 2, states, cos=states, sin=states) == (states, 2)
    assert rotations._rotated(plain, kernel, kept, 2, states, states, cos=states) == (states, 11)
