"""On a CUDA device, drafts of a model change no answer, and its own decode steps are replayed."""

from __future__ import annotations

import random
from pathlib import Path

import models
import pytest
from drafted import drafting

from engine import Engine, Job, Sampling

pytestmark = pytest.mark.gpu


def jobs() -> list[Job]:
    rng = random.Random(6)
    shared = [rng.randrange(3, 500) for _ in range(40)]
    prompts = [[*shared[: 40 * (index % 2)], *rng.choices(range(3, 500), k=9 + index)] for index in range(12)]
    return [
        Job(prompt=prompt, max_new_tokens=40, sampling=Sampling(temperature=float(index % 3 == 0), seed=index))
        for index, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("share", [[0, 100, 0, 100, 0, 100], [50, 50, 50, 50, 100, 0]])
def test_drafts_change_nothing(share: list[int], tmp_path: Path) -> None:
    """float32, so that near ties do not part; the draft is the same model."""
    directory = models.save_model(tmp_path, "llama")
    policy = {"device": "cuda", "gpu-memory": "2GiB", "dtype": "float32", "percent": share}
    with Engine.from_pretrained(str(directory), policy=policy) as engine:
        plain = engine.run(jobs())
        num_plain = engine.num_sweeps
    with drafting(directory, directory, 4, **policy) as engine:
        found = engine.run(jobs())
        draft = engine.parts.draft
        assert draft is not None
        assert engine.num_sweeps < num_plain / 2
        assert draft.drafts.num_came > 0.95 * draft.drafts.num_tried > 0
    for done, answer in zip(found, plain, strict=True):
        assert done.error is None
        assert done.tokens == answer.tokens
        assert done.logprobs == pytest.approx(answer.logprobs, abs=1e-4)


def test_a_draft_in_16_bits_has_its_steps_replayed(tmp_path: Path) -> None:
    directory = models.save_model(tmp_path, "llama")
    policy = {"device": "cuda", "gpu-memory": "2GiB", "dtype": "float16", "percent": [0, 100, 100, 0, 100, 0]}
    with drafting(directory, directory, 5, **policy) as engine:
        done = engine.run(jobs())
        draft = engine.parts.draft
        assert draft is not None
        assert engine.plan.draft is not None
        assert engine.plan.draft.limits.replays
        assert draft.drafts._executor.steps.num_replays > 5  # type: ignore[attr-defined]
        assert draft.drafts._executor.steps.refusal is None  # type: ignore[attr-defined]
        assert draft.drafts.num_came > 0.5 * draft.drafts.num_tried > 0
    assert all(each.error is None and len(each.tokens) == 40 for each in done)
