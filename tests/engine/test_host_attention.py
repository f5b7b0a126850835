"""Protects: attention on the host equals that of `scaled_dot_product_attention`, in both of its forms."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import host_attention

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor]]
FORMS: tuple[Attention, ...] = (host_attention._in_two_passes, host_attention.by_kernel)


def expected(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float64, sequence by sequence and step by step."""
    copies, steps = query.shape[2] // keys.shape[1], query.shape[1]
    query, keys, values = (x.double() for x in (query, keys, values))
    keys, values = keys.repeat_interleave(copies, dim=1), values.repeat_interleave(copies, dim=1)
    results, sums = [], []
    for step in range(steps):
        seen = keys.shape[2] - steps + step + 1
        one = query[:, step, :, None]  # [sequences, heads, 1, dim]
        results.append(F.scaled_dot_product_attention(one, keys[:, :, :seen], values[:, :, :seen], scale=scaling))
        sums.append(((one @ keys[:, :, :seen].mT) * scaling).logsumexp(-1))
    return torch.cat(results, dim=2).transpose(1, 2), torch.cat(sums, dim=2).transpose(1, 2)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60, deadline=None)
@given(
    sequences=st.integers(1, 3),
    steps=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    copies=st.integers(1, 3),
    past=st.integers(0, 40),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_both_forms(
    form: Attention, sequences: int, steps: int, kv_heads: int, copies: int, past: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(past)
    query = torch.randn(sequences, steps, kv_heads * copies, 16, generator=generator).to(dtype)
    rows = torch.randn(sequences, past + steps, 2 * kv_heads * 16, generator=generator).to(dtype)
    keys, values = rows.unflatten(-1, (2, kv_heads, 16)).permute(2, 0, 3, 1, 4)
    result, logsumexp = form(query, keys, values, 0.3)
    right, right_logsumexp = expected(query, keys, values, 0.3)
    bound = 8 * torch.finfo(dtype).eps
    assert result.dtype == dtype
    assert (result.double() - right).abs().max() <= bound * max(1, float(right.abs().max()))
    assert logsumexp.dtype == torch.float32
    assert (logsumexp.double() - right_logsumexp).abs().max() <= bound * 4


@pytest.mark.slow
def test_the_compiled_form() -> None:
    """In a process where nothing was compiled before and compiling is allowed."""
    program = """
import torch
from test_host_attention import expected
from engine import host_attention
for dtype in (torch.float16, torch.bfloat16):
    for steps, copies in ((1, 1), (2, 2)):
        query = torch.randn(3, steps, 2 * copies, 32).to(dtype)
        keys, values = (torch.randn(3, 2, 50, 32).to(dtype) for _ in range(2))
        found, right = host_attention.attention(query, keys, values, 0.2), expected(query, keys, values, 0.2)
        assert (found[0].double() - right[0]).abs().max() < 0.01
        assert (found[1].double() - right[1]).abs().max() < 0.02
assert host_attention.attention._compiled is not None and not host_attention.attention._fails
"""
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "TORCH_COMPILE_DISABLE": "0", "PYTHONPATH": f"{here}:{here.parent.parent}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_a_compiler_the_kernel_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    attention = host_attention.Fused(fail, ("cpu",), otherwise=host_attention.by_kernel)
    query, keys = torch.randn(1, 1, 2, 16), torch.randn(1, 2, 7, 16)
    for _ in range(2):
        assert attention(query, keys, keys, 1.0)[0].equal(host_attention.by_kernel(query, keys, keys, 1.0)[0])
    assert attention._fails
