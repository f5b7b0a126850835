"""Protects: what the examples show is what the engine does."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import models
import pytest

from engine import Engine, Job, Policy

ONE_SWEEP = Path(__file__).resolve().parent.parent / "examples" / "one_sweep.py"
POLICIES = [
    {"device": "cpu"},
    {"device": "cpu", "percent": [0, 100, 0, 100, 0, 100], "gpu-batch-size": 1, "num-gpu-batches": 2},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("policy", POLICIES, ids=["one sweep after the other", "several sweeps for the prompts"])
def test_sweeps_without_the_thread_give_what_transformers_and_the_engine_give(
    policy: dict[str, object], model: Path
) -> None:
    texts = ["The capital of France is", "The capital of France is not", "1 + 1 =", "So"]
    done = runpy.run_path(str(ONE_SWEEP))["completions"](str(model), Policy.load(policy), texts)
    with Engine.from_pretrained(str(model), policy=policy) as engine:
        prompts = [engine.tokenizer(text)["input_ids"] for text in texts]
        expected = engine.run([Job(prompt=prompt, max_new_tokens=8) for prompt in prompts])
    assert [each.error for each in done] == [None] * len(texts)
    reference = models.load_reference(model)
    for prompt, ours, engines in zip(prompts, done, expected, strict=True):
        assert (ours.text, ours.tokens, ours.finish_reason) == (engines.text, engines.tokens, engines.finish_reason)
        assert ours.logprobs == pytest.approx(engines.logprobs, abs=1e-5)
        greedy = models.reference_greedy(reference, prompt, 8)
        assert list(ours.tokens) == greedy


def test_the_example_runs_as_a_program(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(ONE_SWEEP), str(model)])
    runpy.run_path(str(ONE_SWEEP), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" -> ")[0] for line in lines] == [
        "'The capital of France is'",
        "'The capital of France is not'",
        "'1 + 1 ='",
    ]


def test_the_example_can_be_read_in_one_go() -> None:
    assert len(ONE_SWEEP.read_text(encoding="utf-8").splitlines()) < 60
