"""Protects: attention of prompts on the host equals the definition in float64, for any runs of spans and prefixes."""

from __future__ import annotations

import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.host import functions, prompts
from engine.kernels.host.prompts import Run

_DRIVER = r"""
#include "%s"

/* Memory of exactly the bytes that rows have, with random bits: small and large numbers, infinities, NaN. */
static float *numbers(int64_t count) {
    float *made = malloc(4 * count);
    for (int64_t i = 0; i < 4 * count; i++) ((char *)made)[i] = rand() >> 7;
    return made;
}

int main(void) {
    const int64_t dims[][2] = {{1, 3}, {20, 4}, {64, 64}, {80, 72}, {128, 64}};
    srand(1);
    for (int round = 0; round < 60; round++) {
        const int64_t kv = 1 + rand() %% 3, copies = 1 + rand() %% 4, *dim = dims[rand() %% 5];
        const int64_t rows = 1 + rand() %% 300, border = rand() %% rows, length = 1 + rand() %% 200;
        float *query = numbers(rows * kv * copies * dim[0]), *key = numbers(rows * kv * dim[0]);
        float *value = numbers(rows * kv * dim[1]), *output = numbers(rows * kv * copies * dim[1]);
        float *table = numbers(length * kv * (dim[0] + dim[1]));
        const int64_t width = kv * (dim[0] + dim[1]);
        const struct keys keys[] = {
            {table, table + kv * dim[0], length, width, dim[0], width, dim[1]},
            {key, value, border, kv * dim[0], dim[0], kv * dim[1], dim[1]},
            {key + border * kv * dim[0], value + border * kv * dim[1], rows - border, kv * dim[0], dim[0], kv * dim[1],
             dim[1]}};
        const struct span spans[] = {{0, border, 1}, {border, rows, 2}};
        const struct run run = {0, rows, 0, 2, rand() %% 2 - 1};
        struct work w = {keys, spans, &run, 0, kv, copies, dim[0], dim[1], query, kv * copies * dim[0], dim[0], output,
                         0.5f, 0, 0};
        const int64_t some = rows_of_task(&w);
        w.tasks = (rows + some - 1) / some * kv;
        attend_prompts(&w);
        if (w.failed) return 1;
        free(query), free(key), free(value), free(output), free(table);
    }
    return 0;
}
"""


def expected(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, runs: list[Run], scaling: float
) -> torch.Tensor:
    """The same in float64, span by span."""
    copies = query.shape[1] // key.shape[1]
    parts = []
    for run in runs:
        for first, end in pairwise(run.borders):
            keys, values, start = key[first:end], value[first:end], 0
            if run.prefix is not None:
                start = len(run.prefix[0])
                keys, values = torch.cat((run.prefix[0], keys)), torch.cat((run.prefix[1], values))
            keys, values = (x.double().repeat_interleave(copies, dim=1) for x in (keys, values))
            scores = torch.einsum("rhd,khd->hrk", query[first:end].double(), keys) * scaling
            hidden = torch.arange(len(keys)) > torch.arange(end - first)[:, None] + start
            weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
            parts.append(torch.einsum("hrk,khd->rhd", weights, values))
    return torch.cat(parts)


@settings(max_examples=60, deadline=None)
@given(
    runs=st.lists(
        st.tuples(st.integers(0, 300), st.lists(st.integers(1, 150), min_size=1, max_size=4)), min_size=1, max_size=3
    ),
    kv_heads=st.integers(1, 3),
    copies=st.sampled_from([1, 2, 3, 7]),
    dims=st.sampled_from([(16, 16), (64, 64), (128, 96), (8, 24), (20, 4), (1, 3)]),
    large=st.booleans(),
)
def test_equals_the_definition(
    runs: list[tuple[int, list[int]]], kv_heads: int, copies: int, dims: tuple[int, int], large: bool
) -> None:
    """Prefixes in a table `[keys | values]`, queries as layers leave them; scores of hundreds, too."""
    torch.manual_seed(sum(size for _, sizes in runs for size in sizes))
    key_dim, value_dim = dims
    made, first = [], 0
    for length, sizes in runs:
        borders = [first]
        for size in sizes:
            borders.append(borders[-1] + size)
        table = torch.randn(length, kv_heads * (key_dim + value_dim))
        keys, values = table.split((kv_heads * key_dim, kv_heads * value_dim), dim=1)
        prefix = keys.unflatten(1, (kv_heads, -1)), values.unflatten(1, (kv_heads, -1))
        made.append(Run(borders, prefix if length else None))
        first = borders[-1]
    query, key, value = (
        torch.randn(heads, first, dim).transpose(0, 1)
        for heads, dim in ((kv_heads * copies, key_dim), (kv_heads, key_dim), (kv_heads, value_dim))
    )
    scaling = 30.0 / key_dim**0.5 if large else key_dim**-0.5
    found = prompts.attend(query, key, value, made, scaling)
    assert found is not None
    right = expected(query, key, value, made, scaling)
    assert found.shape == right.shape
    assert (found.double() - right).abs().max() <= (3e-4 if large else 5e-6) * max(1.0, float(right.abs().max()))


def test_numbers_that_are_none_stay_in_their_span() -> None:
    query, key, value = torch.randn(60, 2, 32), torch.randn(60, 1, 32), torch.randn(60, 1, 32)
    key[40] = torch.nan
    found = prompts.attend(query, key, value, [Run([0, 30, 60], None)], 1.0)
    assert found is not None
    assert found[:40].isfinite().all()
    assert found[40:].isnan().all()


def test_other_numbers_are_left_to_torch() -> None:
    rows = torch.randn(3, 1, 16).half()
    assert prompts.attend(rows, rows, rows, [Run([0, 3], None)], 1.0) is None


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the sanitizers are asked for as gcc names them")
def test_the_kernel_does_nothing_undefined(tmp_path: Path) -> None:
    """Rows of every kind, and such that are no numbers, under gcc's sanitizers."""
    made, driver = tmp_path / "kernel", tmp_path / "driver.c"
    driver.write_text(_DRIVER % Path(functions.__file__).with_name("prompts.c"))
    checks = "-fsanitize=address,undefined,float-cast-overflow"
    command = ["gcc", "-O1", "-w", "-march=native", checks, "-fno-sanitize-recover=all", str(driver), "-o", str(made)]
    found = subprocess.run([*command, "-lm"], capture_output=True, text=True)
    if found.returncode and "cannot find" in found.stderr:
        pytest.skip("gcc is here without its sanitizers")
    assert found.returncode == 0, found.stderr
    found = subprocess.run([str(made)], capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=0"})
    assert (found.returncode, found.stderr) == (0, "")
