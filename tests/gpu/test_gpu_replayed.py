"""On a CUDA device, decode steps are recorded and replayed, and give what plain transformers gives there."""

from __future__ import annotations

import random
from pathlib import Path

import models
import pytest
import torch

from engine import Engine, Job

pytestmark = pytest.mark.gpu

NUM_NEW = 24


def prompts() -> list[list[int]]:
    rng = random.Random(2)
    shared = [rng.randrange(3, 500) for _ in range(40)]
    inner = [*shared, *(rng.randrange(3, 500) for _ in range(20))]
    starts = [*([shared] * 5), *([inner] * 6), *([[]] * 7)]
    return [start + [rng.randrange(3, 500) for _ in range(rng.randrange(1, 30))] for start in starts]


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3", "gpt-neox", "olmoe"])
def test_replayed_steps_are_near_transformers(family: str, tmp_path: Path) -> None:
    """float16: log-probabilities of the tokens that were chosen within 2e-2 of transformers' float16 on the card."""
    changes = {"num_experts_per_tok": 4} if family == "olmoe" else {}  # near ties of its router
    directory = models.save_model(tmp_path, family, **changes)
    reference = models.load_reference(directory).half().cuda()
    jobs = [Job(prompt=prompt, max_new_tokens=NUM_NEW - i % 5) for i, prompt in enumerate(prompts())]
    policy = {"device": "cuda", "gpu-memory": "2GiB", "dtype": "float16"}
    with Engine.from_pretrained(str(directory), policy=policy) as engine:
        assert engine.plan.limits.replays
        drafted = engine.run(jobs[:3])
        done = engine.run(jobs)
        steps = engine.parts.lanes[0].executor.steps
        assert steps.refusal is None
        assert steps.num_replays > NUM_NEW // 2
    for job, completion in zip([*jobs, *jobs[:3]], [*done, *drafted], strict=True):
        tokens = [*job.prompt, *completion.tokens]
        with torch.no_grad():
            logits = reference(torch.tensor([tokens], device="cuda")).logits[0].float()
        rows = logits.log_softmax(-1).cpu()[len(job.prompt) - 1 : -1]
        for row, token, value in zip(rows, completion.tokens, completion.logprobs, strict=True):
            assert abs(row[token].item() - value) < 2e-2
            assert row.max().item() - row[token].item() < 2e-2  # greedy, but for ties within rounding
