"""Protects: attention on the host equals that of `scaled_dot_product_attention`, by our kernel and by torch's."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import host_attention, host_kernel
from engine.codec import Codec

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@pytest.fixture
def _forgetful() -> Iterator[None]:
    """The kernel is looked for anew, then and afterwards."""
    host_kernel._kernel.cache_clear()
    yield
    host_kernel._kernel.cache_clear()


def expected(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float64, step by step."""
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


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(3, 60), min_size=1, max_size=4),
    steps=st.integers(1, 3),
    kv_heads=st.integers(1, 5),
    copies=st.integers(1, 3),
    dims=st.sampled_from([(16, 16), (64, 64), (128, 64), (8, 24), (20, 4)]),
    dtype=DTYPES,
    bits=st.sampled_from([0, 4, 8]),
    large=st.booleans(),
)
def test_our_kernel(
    lengths: list[int],
    steps: int,
    kv_heads: int,
    copies: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    bits: int,
    large: bool,
) -> None:
    """Sequences of several lengths, anywhere in a table; scores of hundreds, too."""
    generator = torch.Generator().manual_seed(sum(lengths))
    (key_dim, value_dim), width = dims, kv_heads * sum(dims)
    if width % 64 and bits:
        return
    table = torch.randn(sum(lengths) + 50, width, generator=generator).to(dtype)
    if bits:
        codes = Codec(bits).encode_rows(table)
        table = Codec(bits).decode_rows(codes, width, dtype)
    firsts = torch.tensor([7 + sum(lengths[:i]) + 5 * i for i in range(len(lengths))])
    query = torch.randn(len(lengths), steps, kv_heads * copies, key_dim, generator=generator).to(dtype)
    scaling = 30.0 if large else 0.3
    found = host_kernel.attend(
        codes if bits else table, firsts, torch.tensor(lengths), query, (kv_heads, *dims), dtype, bits, scaling
    )
    if bits and (kv_heads * key_dim % 64 or kv_heads * value_dim % 64):  # a group has both keys and values
        assert found is None
        return
    assert found is not None
    # Our kernel does not round what it decodes to 16 bits.
    bound = (0.3 if large else 2e-2) if bits and dtype is not torch.float32 else 3e-4 if large else 1e-5
    bound *= 4 if dtype is torch.bfloat16 else 1
    for sequence, (first, length) in enumerate(zip(firsts.tolist(), lengths, strict=True)):
        keys, values = table[first : first + length].split((kv_heads * key_dim, kv_heads * value_dim), dim=1)
        keys, values = (x.unflatten(1, (kv_heads, -1)).transpose(0, 1)[None] for x in (keys, values))
        right = expected(query[sequence : sequence + 1], keys, values, scaling)
        for mine, yours in zip(found, right, strict=True):
            assert mine.dtype == torch.float32
            assert (mine[sequence].double() - yours[0]).abs().max() <= bound * max(1, float(yours.abs().max()))


@settings(max_examples=60, deadline=None)
@given(
    sequences=st.integers(1, 3),
    steps=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    copies=st.integers(1, 3),
    past=st.integers(0, 40),
    dtype=DTYPES,
)
def test_by_torch(sequences: int, steps: int, kv_heads: int, copies: int, past: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(past)
    query = torch.randn(sequences, steps, kv_heads * copies, 16, generator=generator).to(dtype)
    rows = torch.randn(sequences, past + steps, 2 * kv_heads * 16, generator=generator).to(dtype)
    keys, values = rows.unflatten(-1, (2, kv_heads, 16)).permute(2, 0, 3, 1, 4)
    result, logsumexp = host_attention.by_torch(query, keys, values, 0.3)
    right, right_logsumexp = expected(query, keys, values, 0.3)
    bound = 8 * torch.finfo(dtype).eps
    assert result.dtype == dtype
    assert (result.double() - right).abs().max() <= bound * max(1, float(right.abs().max()))
    assert logsumexp.dtype == torch.float32
    assert (logsumexp.double() - right_logsumexp).abs().max() <= bound * 4


def test_numbers_that_are_none_stay_so() -> None:
    """One sequence's NaN is its own."""
    table = torch.randn(20, 128).half()
    table[3, 5] = torch.nan
    query = torch.randn(2, 1, 1, 64).half()
    found = host_kernel.attend(
        table, torch.tensor([0, 10]), torch.tensor([10, 10]), query, (1, 64, 64), torch.float16, 0, 1.0
    )
    assert found is not None
    assert found[1][0].isnan().all()
    assert found[0][0].isnan().all()
    assert found[0][1].isfinite().all()


@pytest.mark.usefixtures("_forgetful")
def test_a_compiled_kernel_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert host_kernel._kernel() is not None
    (kept,) = (tmp_path / "flexgen-helm").iterdir()
    host_kernel._kernel.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)
    assert host_kernel._kernel() is not None
    assert list((tmp_path / "flexgen-helm").iterdir()) == [kept]


@pytest.mark.usefixtures("_forgetful")
@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false"])
def test_without_a_compiler_torch_attends(
    compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    table, places = torch.randn(4, 64), torch.tensor([4])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            query = torch.randn(1, 1, 1, 32)
            assert host_kernel.attend(table, places - 4, places, query, (1, 32, 32), torch.float32, 0, 1.0) is None
    assert len(caplog.records) == 1
    assert "runs on torch's kernel" in caplog.text
    assert list((tmp_path / "flexgen-helm").iterdir()) == []
