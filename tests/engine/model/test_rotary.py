"""Protects: attention turns queries and keys by our kernel only where its family's function gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import parity
import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as interleaved
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb as of_halves
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as of_llama

from engine import Engine
from engine.kernels.rotary import rotated
from engine.model import causal_model
from engine.model.fused import rotary
from engine.model.fused.rotary import widths_of

DTYPE = torch.bfloat16
Turned = tuple[torch.Tensor, torch.Tensor]


def test_functions_are_known_by_what_they_compute() -> None:
    assert widths_of(of_llama, DTYPE) == {2}
    assert widths_of(of_halves, DTYPE) == {1}
    assert widths_of(interleaved, DTYPE) == set()

    def backwards(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Turned:
        return of_llama(query, key, cos, -sin)

    def in_wide(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Turned:
        return tuple(x.to(DTYPE) for x in of_llama(query.float(), key.float(), cos.float(), sin.float()))

    assert widths_of(backwards, DTYPE) == widths_of(in_wide, DTYPE) == set()


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss"])
def test_models_that_have_it_equal_transformers(
    family: str,
    build: Callable[[str], Path],
    reference: Callable[[str], PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel is played by torch's functions on the CPU, in 32 bits."""
    calls: list[torch.Size] = []

    def kernel(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        calls.append(states.shape)
        return rotated(states, cos, sin)

    monkeypatch.setattr(rotary, "kernel_for", lambda device: kernel)
    monkeypatch.setattr(rotary, "_is_there", lambda states: True)
    plain = rotary.fuse_rotary
    monkeypatch.setattr(
        causal_model, "fuse_rotary", lambda layers, context, device, dtype: plain(layers, context, device, DTYPE)
    )
    with Engine.from_pretrained(str(build(family)), policy={"device": "cpu"}) as engine:
        done = engine.run(parity.JOBS)
    assert calls
    found, largest = parity.differences(parity.expect(reference(family)), done)
    assert not found
    assert largest < parity.TOLERANCE
