"""Protects: a draft model changes no answer, saves sweeps as it agrees, and leaves nothing behind in its cache."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from drafted import NUM_NEW, assert_nothing_held, assert_same, drafting, jobs
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine import Completion, Engine
from engine.errors import CapacityError, ConfigError, UnsupportedError
from engine.schedule.segment import Segment

TIGHT = {"gpu-memory": "6MB", "percent": [0, 100, 0, 100, 0, 100]}


@pytest.fixture(scope="module")
def plain(build: Callable[[str], Path]) -> Callable[[str], list[Completion]]:
    @cache
    def of(family: str) -> list[Completion]:
        with Engine.from_pretrained(str(build(family)), policy={"device": "cpu"}) as engine:
            return engine.run(jobs())

    return of


@pytest.fixture(scope="module")
def stranger(build: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same tokenizer with other random numbers."""
    directory = models.save_model(tmp_path_factory.mktemp("stranger"), "opt")
    model = AutoModelForCausalLM.from_pretrained(directory)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    model.save_pretrained(directory)
    return directory


CASES: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "few in a micro-batch": ("llama", {"percent": [34, 33, 34, 33, 34, 33], "gpu-batch-size": 3}, None),
    "own attention, prompts in pieces": ("gptj", {"percent": [0, 100, 0, 100, 0, 100]}, 8),
}
"""Family, policy, and rows of the pieces in which the draft takes prompts."""


@pytest.mark.parametrize("case", CASES)
def test_the_same_model_as_draft_is_right_each_time(
    case: str, build: Callable[[str], Path], plain: Callable[[str], list[Completion]], tmp_path: Path
) -> None:
    family, policy, pieces = CASES[case]
    with drafting(build(family), build(family), 3, **policy, **{"offload-dir": str(tmp_path)}) as engine:
        assert engine.parts.draft is not None
        shadows = engine.parts.draft.drafts._shadows
        shadows._limits = replace(shadows._limits, rows_per_piece=pieces)
        assert_same(engine.run(jobs()), plain(family))
        assert_nothing_held(engine)
        draft = engine.parts.draft
        assert draft is not None
        assert draft.drafts.num_came == draft.drafts.num_tried > 100
        before = engine.num_sweeps
        engine.run(jobs()[:1])  # a token of the prompt's sweep, then four of each
        assert engine.num_sweeps - before == 1 + -(-(NUM_NEW - 1) // 4)


def test_a_draft_that_is_wrong_changes_nothing(
    build: Callable[[str], Path],
    plain: Callable[[str], list[Completion]],
    stranger: Path,
    reference: Callable[[str], PreTrainedModel],
) -> None:
    with drafting(build("llama"), stranger, 5) as engine:
        found = engine.run(jobs())
        assert_same(found, plain("llama"))
        assert_nothing_held(engine)
        draft = engine.parts.draft
        assert draft is not None
        assert draft.drafts.num_came < 0.2 * draft.drafts.num_tried
        assert draft.drafts.num_tried > 50
    for job, done in [*zip(jobs(), found, strict=True)][:2]:
        assert list(done.tokens) == models.reference_greedy(reference("llama"), list(job.prompt), job.max_new_tokens)


def test_what_was_drafted_in_vain_is_forgotten(
    build: Callable[[str], Path], plain: Callable[[str], list[Completion]]
) -> None:
    """The second token of each draft is made wrong: the first of the next one, computed behind it, is right again."""
    with drafting(build("llama"), build("llama"), 3) as engine:
        draft = engine.parts.draft
        assert draft is not None
        executor, passes = draft.drafts._executor, count(1)
        choices = executor.choices

        def spoiled(batches: list[list[Segment]]) -> dict[int, int]:
            is_second = next(passes) % 3 == 2
            return {span: token + 3 if is_second else token for span, token in choices(batches).items()}

        executor.__dict__["choices"] = spoiled
        assert_same(engine.run(jobs()[:1]), plain("llama")[:1])
        assert engine.num_sweeps == 1 + NUM_NEW // 2
        draft.drafts.add([], 0, engine.parts.lanes[0].scheduler.limits)
        assert (draft.drafts.num_came, draft.drafts.num_tried) == (NUM_NEW // 2 - 1, NUM_NEW - 2)


def refused(model: Path, draft: Path, **policy: Any) -> str:
    with pytest.raises((CapacityError, ConfigError, UnsupportedError)) as caught:
        drafting(model, draft, 1, **policy)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_draft_is_refused(build: Callable[[str], Path], stranger: Path, tmp_path: Path) -> None:
    other = models.save_model(tmp_path / "other", "opt")
    file = other / "tokenizer.json"
    told = json.loads(file.read_text())
    vocabulary = told["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(told))
    message = refused(build("llama"), other)
    assert f"id {vocabulary[second]} is {second!r} there and {first!r} here" in message.replace('"', "'")
    states = models.save_model(tmp_path / "states", "mamba2")
    assert "its layers keep a state" in refused(build("llama"), states)
    assert "layers of the model keep a state" in refused(states, build("llama"))
    assert re.search(r"draft-model: its weights [\d.]+ MB, .* exceed", refused(build("llama"), stranger, **TIGHT))
