"""Protects: with batch-invariant, a job has the same bits in any company, order and size of micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import companies
import models
import pytest
import torch
from transformers import PreTrainedModel

from engine import Engine, Job, Policy
from engine.errors import ConfigError, UnsupportedError
from engine.kernels.invariant import sums
from engine.kernels.invariant.mode import BatchInvariant
from engine.kernels.invariant.products import Products
from engine.model.attention import blockwise

POLICIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "streamed": {"percent": [20, 80, 0, 100, 0, 100]},
    "4 bits": {"compress-weight": 4, "compress-cache": 4, "percent": [20, 80, 50, 50, 100, 0]},
    "attention on the host": {"cpu-cache-compute": True, "percent": [20, 80, 0, 100, 100, 0]},
}


def _policy(dtype: str, **others: Any) -> dict[str, Any]:
    return {"device": "cpu", "dtype": dtype, "batch-invariant": True, **others}


@pytest.mark.parametrize(
    ("family", "dtype", "policy"),
    [
        ("llama", "bfloat16", "4 bits"),
        pytest.param("llama", "float32", "plain", marks=pytest.mark.slow),
        pytest.param("gpt-oss", "bfloat16", "plain", marks=pytest.mark.slow),
        ("gemma2", "float16", "attention on the host"),
        pytest.param("mixtral", "float16", "streamed", marks=pytest.mark.slow),
        pytest.param("deepseek-v3", "bfloat16", "streamed", marks=pytest.mark.slow),
        ("mamba2", "float32", "plain"),
        pytest.param("qwen3-next", "bfloat16", "4 bits", marks=pytest.mark.slow),
        pytest.param("falcon-h1", "float16", "streamed", marks=pytest.mark.slow),
        pytest.param("lfm2", "float32", "attention on the host", marks=pytest.mark.slow),
        pytest.param("llama4", "bfloat16", "streamed", marks=pytest.mark.slow),
        pytest.param("gemma4-multimodal", "bfloat16", "streamed", marks=pytest.mark.slow),
    ],
)
def test_company_changes_no_bit(
    family: str, dtype: str, policy: str, build: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "_BLOCK", 32)  # prefixes and own tokens of these windows take several
    jobs = companies.make_jobs(10, 100)
    assert companies.num_changed(build(family), jobs, _policy(dtype, **POLICIES[policy]), 4) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_forty_jobs_have_the_same_bits_in_fifty_companies(family: str, policy: str, dtype: str, tmp_path: Path) -> None:
    path = models.save_model(tmp_path, family, max_position_embeddings=512)
    assert companies.num_changed(path, companies.make_jobs(40, 512), _policy(dtype, **POLICIES[policy]), 50) == 0


def test_without_it_company_changes_bits(build: Callable[[str], Path]) -> None:
    """What the other tests would say if the arithmetic were torch's own."""
    policy = {**_policy("bfloat16"), "batch-invariant": False}
    assert companies.num_changed(build("llama"), companies.make_jobs(10, 100), policy, 4) > 0


@pytest.mark.parametrize("family", ["llama", "gpt-oss", "mixtral", "gemma2", "qwen3-next"])
def test_answers_are_those_of_transformers(
    family: str, build: Callable[[str], Path], reference: Callable[[str], PreTrainedModel]
) -> None:
    jobs = [Job(prompt=[*range(5, 5 + n)], max_new_tokens=0, prompt_logprobs=True) for n in (2, 40, 90)]
    with Engine.from_pretrained(str(build(family)), policy=_policy("float32")) as engine:
        done = engine.run(jobs)
    for job, completion in zip(jobs, done, strict=True):
        with torch.no_grad():
            logprobs = reference(family)(torch.tensor([job.prompt])).logits[0].log_softmax(-1)
        expected = [logprobs[at, token].item() for at, token in enumerate(job.prompt[1:])]
        assert completion.prompt_logprobs is not None
        assert completion.prompt_logprobs[1:] == pytest.approx(expected, abs=1e-5, rel=0)


@pytest.mark.parametrize("family", ["bloom", "falcon-alibi"])
def test_a_family_that_carries_its_own_attention_is_refused(family: str, build: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedError, match="batch-invariant: it carries its own attention"):
        Engine.from_pretrained(str(build(family)), policy=_policy("float32"))


def test_a_function_that_is_not_known_is_refused_by_name() -> None:
    with BatchInvariant(), pytest.raises(UnsupportedError, match=r"computes aten\.cumprod"):
        torch.cumprod(torch.ones(3), 0)


@pytest.mark.parametrize("from_row", [1, 17, 28, 31])
def test_a_library_whose_rows_depend_on_their_place_is_asked_row_by_row(
    from_row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few rows come first: which sizes are uneven is not seen from those."""

    def uneven(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        product = (rows.double() @ matrix.double()).float()
        product[from_row:] *= 1 + 2**-20
        return product

    monkeypatch.setattr(torch, "mm", uneven)
    products, matrix = Products(), torch.randn(8, 4)
    rows = torch.randn(50, 8)
    single = torch.cat([products.mm(row[None], matrix) for row in rows])
    assert torch.equal(products.mm(rows, matrix), single)


@pytest.mark.parametrize("num_threads", [1, 3, 4])
@pytest.mark.parametrize(("inner", "columns"), [(130, 33), (511, 33), (514, 100)])
def test_odd_sizes_and_threads_change_no_bit_of_a_row(inner: int, columns: int, num_threads: int) -> None:
    """MKL's products depend on places and on alignment at such sizes, with several threads."""
    rows, matrix = torch.randn(70, inner), torch.randn(columns, inner).mT
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        products = Products()
        single = torch.cat([products.mm(row[None], matrix) for row in rows])
        assert torch.equal(products.mm(rows, matrix), single)
        assert torch.equal(products.mm(rows[3:], matrix), single[3:])
    finally:
        torch.set_num_threads(before)


def test_matrices_whose_products_depend_on_their_place_are_asked_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def uneven(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        product = (rows.double() @ matrices.double()).float()
        product[5:] *= 1 + 2**-20
        return product

    monkeypatch.setattr(torch, "bmm", uneven)
    products, rows, matrices = Products(), torch.randn(7, 3, 8), torch.randn(7, 8, 4)
    single = torch.cat([products.bmm(rows[at : at + 1], matrices[at : at + 1]) for at in range(7)])
    assert torch.equal(products.bmm(rows, matrices), single)


def test_products_in_wider_numbers() -> None:
    """As attention asks for them on CUDA."""
    rows, matrices = torch.randn(2, 3, 8).half(), torch.randn(2, 8, 4).half()
    with BatchInvariant():
        found = torch.bmm(rows, matrices, out_dtype=torch.float32)
    torch.testing.assert_close(found, rows.float() @ matrices.float())


def test_products_go_where_they_are_wanted() -> None:
    rows, matrix, found = torch.randn(3, 8), torch.randn(8, 4), torch.zeros(5, 4)
    with BatchInvariant():
        torch.mm(rows, matrix, out=found[1:4])
    torch.testing.assert_close(found[1:4], rows @ matrix)
    assert not found[[0, 4]].any()


@pytest.mark.parametrize("accumulate", [True, False])
def test_a_sum_at_given_places_is_refused(accumulate: bool) -> None:
    target, where = torch.zeros(4), torch.tensor([1, 1])
    with BatchInvariant():
        if accumulate:
            with pytest.raises(UnsupportedError, match=r"computes aten\.index_put"):
                target.index_put_((where,), torch.ones(2), accumulate=True)
        else:
            assert target.index_put_((where,), torch.ones(2))[1] == 1


def test_attention_on_the_host_must_hold_for_all_sequences() -> None:
    with pytest.raises(ConfigError, match=r"needs kv-cache: \{cpu: 100\}"):
        Policy.from_mapping({"batch-invariant": True, "cpu-cache-compute": True, "percent": [0, 100, 50, 50, 100, 0]})


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 100])
def test_sums_and_what_is_made_of_them(count: int) -> None:
    numbers = torch.randn(5, count, generator=torch.Generator().manual_seed(count))
    exact = numbers.double()
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(sums.total(numbers, (1,)), exact.sum(1).float(), **close)
    torch.testing.assert_close(sums.total(numbers, (0, 1)), exact.sum().float(), **close)
    torch.testing.assert_close(sums.mean(numbers.bfloat16(), (1,)), numbers.bfloat16().mean(1))
    torch.testing.assert_close(sums.softmax(numbers, 1), exact.softmax(1).float(), **close)
    torch.testing.assert_close(sums.log_softmax(numbers, 1), exact.log_softmax(1).float(), **close)
    torch.testing.assert_close(sums.cumulated(numbers), exact.cumsum(1).float(), **close)
    weight, bias = torch.randn(2, count)
    normed = torch.nn.functional.layer_norm(numbers, (count,), weight, bias)
    torch.testing.assert_close(sums.layer_norm(numbers, (count,), weight, bias, 1e-5)[0], normed, rtol=1e-3, atol=1e-4)
    scaled = torch.nn.functional.rms_norm(numbers, (count,), weight, 1e-6)
    torch.testing.assert_close(sums.rms_norm(numbers, (count,), weight, 1e-6)[0], scaled, **close)


def test_a_number_is_computed_alike_wherever_it_stands() -> None:
    """Behind the last whole vector torch's CPU kernels go on with other functions."""
    numbers = torch.randn(1003, generator=torch.Generator().manual_seed(0))
    for function in (torch.sigmoid, torch.nn.functional.silu, torch.nn.functional.gelu):
        with BatchInvariant():
            whole = function(numbers)
            single = torch.stack([function(number[None])[0] for number in numbers])
        assert torch.equal(whole, single)
        torch.testing.assert_close(whole, function(numbers))
