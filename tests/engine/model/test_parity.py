"""Protects: every family, under every placement and padding, gives what plain `transformers` gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import models
import parity
import pytest
import torch
from parity import JOBS, PADDINGS, POLICIES
from transformers import PreTrainedModel
from watch import Watch

from engine import Engine, Job, Sampling

DOCUMENT = Path(__file__).parents[3] / "docs" / "families.md"
TIED = ("opt", "gpt2", "gemma2", "bloom")


@pytest.fixture(scope="module")
def expected(reference: Callable[[str], PreTrainedModel]) -> Callable[[str], list[parity.Expected]]:
    return cache(lambda family: parity.expect(reference(family)))


# The core under all policies and paddings (those with their own attention are padded anyway). The others' layers are
# made of the same things: two cases, with parameters and cache on all tiers, show that they are driven rightly. More of
# them would show little more, and the time goes with the number of families.
CASES = [
    *product([family for family in models.FAMILIES if family in models.CORE], POLICIES, PADDINGS),
    *product([family for family in models.OWN_ATTENTION if family in models.CORE], POLICIES, ["packed"]),
    *product([family for family in models.OWN_ATTENTION if family in models.CORE], ["thirds"], ["bucket", "fixed"]),
]
for _family in [*models.FAMILIES, *models.OWN_ATTENTION]:
    CASES += [(_family, *pair) for pair in parity.SELECTION[1:] if _family not in models.CORE]


def is_quick(family: str, policy: str, padding: str) -> bool:
    """Every family once; every policy and padding with a few, whose code meets all that others' could notice of it."""
    if padding != "packed":
        return policy == "thirds" and family in ("opt", "gpt-oss", "bloom")
    return policy in ("thirds", "small") or family in ("opt", "deepseek-v3", "bloom")


@pytest.mark.parametrize(
    ("family", "policy", "padding"),
    [pytest.param(*case, marks=[] if is_quick(*case) else [pytest.mark.slow]) for case in CASES],
)
def test_equals_transformers(
    family: str,
    policy: str,
    padding: str,
    build: Callable[[str], Path],
    expected: Callable[[str], list[parity.Expected]],
    reference: Callable[[str], PreTrainedModel],
    tmp_path: Path,
) -> None:
    settings = {**POLICIES[policy], "pad-to-seq-len": PADDINGS[padding], "device": "cpu", "offload-dir": str(tmp_path)}
    with Engine.from_pretrained(str(build(family)), policy=settings) as engine:
        has_interface = family in models.FAMILIES or engine.parts.model.module._supports_attention_backend
        assert engine.parts.model.is_padded != has_interface
        watch = Watch(engine)
        done = engine.run(JOBS)
    found = parity.differences(expected(family), done)[0]
    if found and family == "gemma4-multimodal":  # transformers' own float32 is 3e-4 from what it computes in float64
        found = parity.differences(parity.expect(copy.deepcopy(reference(family)).double()), done)[0]
    assert found == []
    if policy != "small":  # that one takes several sweeps to take in all jobs
        saved = parity.UNFED + (0 if padding == "fixed" else parity.SAVED)
        assert watch.tokens[0] == sum(len(job.prompt) for job in JOBS) - saved
        if family in models.FAMILIES:
            assert watch.rows[0] == first_sweep_rows(padding)


def first_sweep_rows(padding: str) -> int:
    """Rows of a sweep that takes in all jobs: this many only if prefixes are shared, or prompts padded, as expected."""
    if padding == "fixed":  # no prefix sharing then
        return len(JOBS) * 80
    if padding == "bucket":  # every sequence's own tokens fill one bucket of 64
        return len(JOBS) * 64 + parity.OUTER + parity.INNER + parity.WIDE
    return sum(len(job.prompt) for job in JOBS) - parity.SAVED - parity.UNFED


def test_jobs_are_what_the_test_means() -> None:
    longest = max(len(job.prompt) for job in JOBS)
    assert parity.OUTER + parity.INNER < longest <= 80 < models.WINDOW
    assert sum(1 for job in JOBS if len(job.prompt) == 1) == 3
    assert {job.max_new_tokens for job in JOBS} == {0, 1, 8}


@pytest.mark.parametrize("family", [*models.FAMILIES, *models.OWN_ATTENTION])
def test_attention_matters_in_every_tiny_model(family: str, reference: Callable[[str], PreTrainedModel]) -> None:
    assert parity.reach(reference(family)) > parity.REACH


def test_the_document_claims_no_family_that_is_not_tested() -> None:
    """The lists may be ahead of docs/families.md, never behind it."""
    lines = DOCUMENT.read_text(encoding="utf-8").split("## Tested")[1].split("##")[0].splitlines()
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    tested = [[name, kind, "interface"] for name, (kind, _) in models.FAMILIES.items()]
    tested += [[name, kind, "own"] for name, (kind, _) in models.OWN_ATTENTION.items()]
    assert len(rows) > 40
    assert [row for row in rows if row not in tested] == []


def assert_scores(engine: Engine, model: PreTrainedModel, prompts: list[list[int]]) -> None:
    jobs = [Job(prompt=prompt, max_new_tokens=1, prompt_logprobs=True) for prompt in prompts]
    for prompt, completion in zip(prompts, engine.run(jobs), strict=True):
        assert completion.error is None
        found = [*(completion.prompt_logprobs or ()), *completion.logprobs][1:]
        expected = models.reference_logprobs(model, [*prompt, *completion.tokens])
        assert found == pytest.approx(expected, abs=1e-4, rel=0)


@pytest.mark.parametrize("policy", ["device", "small"])
@pytest.mark.parametrize("family", ["opt", "llama", "gemma2", "bloom", *parity.LATER])
def test_it_is_told_which_tokens_of_a_prompt_are_greedy(
    family: str, policy: str, build: Callable[[str], Path], reference: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    """Also whether the token behind a shared prefix is."""
    model, start = reference(family), [7 + 11 * i for i in range(20)]
    for _ in range(8):
        with torch.no_grad():
            start.append(int(model(torch.tensor([start])).logits[0, -1].argmax()))
    prompts = [start, [*start[:24], 9, *start[25:]], [*start[:24], 10, 11], start[:1], start[:25]]
    jobs = [
        Job(prompt=prompt, max_new_tokens=count, prompt_logprobs=True, likeliest=True, sampling=sampling)
        for prompt in prompts
        for count, sampling in ((0, Sampling()), (3, Sampling(temperature=2.0, seed=3)))
    ]
    jobs.append(Job(prompt=start, max_new_tokens=3))
    settings = {**POLICIES[policy], "device": "cpu", "offload-dir": str(tmp_path)}
    with Engine.from_pretrained(str(build(family)), policy=settings) as engine:
        done = engine.run(jobs)
    for job, completion in zip(jobs[:-1], done, strict=False):
        assert completion.error is None
        with torch.no_grad():
            logits = model(torch.tensor([[*job.prompt, *completion.tokens]])).logits[0]
        best = logits.argmax(-1).tolist()
        told = [*(completion.prompt_likeliest or ()), *(completion.likeliest or ())][1:]
        assert [token for token, _ in told] == best[: len(told)]
        assert [score for _, score in told] == pytest.approx(
            logits.log_softmax(-1).amax(-1)[: len(told)].tolist(), abs=1e-4
        )
        assert len(told) == len(job.prompt) + len(completion.tokens) - 1
        expected = [token == guess for token, guess in zip(job.prompt[1:], best, strict=False)]
        assert completion.prompt_greedy == (None, *expected)
        assert sum(expected) >= min(4, len(expected))
    assert (done[-1].prompt_greedy, done[-1].likeliest, done[-1].prompt_likeliest) == (None, None, None)


@pytest.mark.parametrize("padding", [None, "bucket", models.WINDOW])
@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", *parity.LATER])
def test_a_prompt_may_fill_the_window_under_any_pad(
    family: str, padding: Any, build: Callable[[str], Path], reference: Callable[[str], PreTrainedModel]
) -> None:
    prompts = [[5 + i for i in range(size)] for size in (models.WINDOW, models.WINDOW - 1, 65)]
    with Engine.from_pretrained(str(build(family)), policy={"device": "cpu", "pad-to-seq-len": padding}) as engine:
        assert_scores(engine, reference(family), prompts)


@pytest.mark.parametrize("padding", [None, "bucket", models.WINDOW])
@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "xglm", *parity.LATER])
def test_a_prompt_that_is_only_scored_may_be_one_longer_than_the_window(
    family: str, padding: Any, build: Callable[[str], Path], reference: Callable[[str], PreTrainedModel]
) -> None:
    """As rolling perplexity windows are: nothing is asked behind the last token, so it takes no position."""
    start = [5 + i for i in range(models.WINDOW - 1)]
    jobs = [Job(prompt=[*start, 7, last], max_new_tokens=0, prompt_logprobs=True) for last in (9, 11)]
    jobs += [Job(prompt=[*start, 7], max_new_tokens=1, prompt_logprobs=True)]
    over = [Job(prompt=[*start, 7, 9, 3], max_new_tokens=0, prompt_logprobs=True)]
    over += [Job(prompt=[*start, 7, 9], max_new_tokens=1, prompt_logprobs=True)]
    with Engine.from_pretrained(str(build(family)), policy={"device": "cpu", "pad-to-seq-len": padding}) as engine:
        done = engine.run([*jobs, *over])
    for job, completion in zip(jobs, done[:3], strict=True):
        assert completion.error is None
        assert completion.prompt_logprobs is not None
        expected = models.reference_logprobs(reference(family), list(job.prompt))
        assert completion.prompt_logprobs[1:] == pytest.approx(expected, abs=1e-4, rel=0)
    assert all("window of 128" in str(completion.error) for completion in done[3:])


@pytest.mark.parametrize("num_layers", [1, 2, 5])
@pytest.mark.parametrize("tied", [True, False])
def test_any_number_of_layers_takes_turns_in_the_slots(num_layers: int, tied: bool, tmp_path: Path) -> None:
    directory = models.save_model(tmp_path / "model", "llama", num_hidden_layers=num_layers, tie_word_embeddings=tied)
    model = models.load_reference(directory)
    prompts = [[*range(7, 7 + size)] for size in (30, 31, 3)]
    for percent in (POLICIES["host"]["percent"], POLICIES["thirds"]["percent"], [95, 5, 100, 0, 100, 0]):
        policy = {"device": "cpu", "percent": percent, "offload-dir": str(tmp_path / "offload")}
        with Engine.from_pretrained(str(directory), policy=policy) as engine:
            for _ in range(2):
                assert_scores(engine, model, prompts)


@pytest.mark.parametrize("family", TIED)
def test_shards_of_a_model_whose_head_is_the_embedding(
    family: str, reference: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    """As large checkpoints come: the index lists the pair once."""
    model = reference(family)
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    models.make_tokenizer().save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    policy = {"device": "cpu", "offload-dir": str(tmp_path / "offload"), **POLICIES["thirds"]}
    with Engine.from_pretrained(str(tmp_path / "model"), policy=policy) as engine:
        assert_scores(engine, model, [[*range(7, 7 + size)] for size in (30, 31, 3)])
