"""Protects: attention on the host equals that of `scaled_dot_product_attention`, by our kernel and by torch's."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels import host_kernel
from engine.kernels.codec import Codec

_DRIVER = r"""
#include "%s"
#include <stdio.h>

/* Tables of exactly the bytes that rows have, with random bits: small and large numbers, infinities, NaN. */
int main(void) {
    const int64_t dims[][2] = {{1, 3}, {20, 4}, {16, 16}, {64, 64}, {80, 80}, {128, 64}, {256, 256}};
    srand(1);
    for (int round = 0; round < 3000; round++) {
        const int64_t heads = 1 + rand() %% 5, copies = 1 + rand() %% 2, steps = 1 + rand() %% 2, count = rand() %% 4;
        const int64_t *dim = dims[rand() %% 7], width = heads * (dim[0] + dim[1]), type = rand() %% 3;
        const int64_t bits = dim[0] %% 64 || dim[1] %% 64 ? 0 : rand() %% 3 * 4, size = type == FLOAT32 ? 4 : 2;
        const int64_t row_bytes = bits ? width * bits / 8 + 4 * (width / 64) : width * size;
        int64_t firsts[4], lengths[4], rows = 0;
        for (int64_t s = 0; s < count; s++) {
            firsts[s] = rows;
            rows += lengths[s] = steps + rand() %% 40;
        }
        uint8_t *table = malloc(rows * row_bytes);
        for (int64_t i = 0; i < rows * row_bytes; i++) table[i] = rand() >> 7;
        const int64_t queries = count * steps * heads * copies;
        char *query = malloc(size * queries * dim[0]), *output = malloc(size * queries * dim[1]);
        float *sums = malloc(4 * queries);
        for (int64_t i = 0; i < size * queries * dim[0]; i++) query[i] = rand() >> 7;
        const int64_t block = 1 + rand() %% heads;
        struct work w = {(char *)table, row_bytes, firsts, lengths, heads, dim[0], dim[1], steps, copies,
                         block, count * ((heads + block - 1) / block), type, bits, query, output, sums, 0.5f, 0};
        if (attend(&w)) return 1;
        free(table), free(query), free(output), free(sums);
    }
    return 0;
}
"""

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
    rounding = torch.finfo(dtype).eps / 2
    for sequence, (first, length) in enumerate(zip(firsts.tolist(), lengths, strict=True)):
        keys, values = table[first : first + length].split((kv_heads * key_dim, kv_heads * value_dim), dim=1)
        keys, values = (x.unflatten(1, (kv_heads, -1)).transpose(0, 1)[None] for x in (keys, values))
        right = expected(query[sequence : sequence + 1], keys, values, scaling)
        for mine, yours, kind, around in zip(found, right, (dtype, torch.float32), (rounding, 0.0), strict=True):
            assert mine.dtype == kind
            most = bound * max(1, float(yours.abs().max())) + around * yours[0].abs()
            assert ((mine[sequence].double() - yours[0]).abs() <= most).all()


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
    result, logsumexp = host_kernel.by_torch(query, keys, values, 0.3)
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


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the sanitizers are asked for as gcc names them")
def test_the_kernel_does_nothing_undefined(tmp_path: Path) -> None:
    """Rows of every kind, and such that are no numbers, under gcc's sanitizers."""
    made, driver = tmp_path / "kernel", tmp_path / "driver.c"
    driver.write_text(_DRIVER % host_kernel._SOURCE)
    checks = "-fsanitize=address,undefined,float-cast-overflow"
    command = ["gcc", "-O1", "-w", "-march=native", checks, "-fno-sanitize-recover=all", str(driver), "-o", str(made)]
    found = subprocess.run([*command, "-lm"], capture_output=True, text=True)
    if found.returncode and "cannot find" in found.stderr:
        pytest.skip("gcc is here without its sanitizers")
    assert found.returncode == 0, found.stderr
    found = subprocess.run([str(made)], capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=0"})
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.usefixtures("_forgetful")
def test_a_compiled_kernel_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert host_kernel._kernel() is not None
    kept = sorted((tmp_path / "flexgen-helm").iterdir())
    assert [file.suffix for file in kept] == [".sha256", ".so"]
    host_kernel._kernel.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)
    assert host_kernel._kernel() is not None
    assert sorted((tmp_path / "flexgen-helm").iterdir()) == kept


@pytest.mark.usefixtures("_forgetful")
@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false", "cc '"])
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
    assert list((tmp_path / "flexgen-helm").glob("*")) == []
