"""What becomes of a family's tiny random model: equal to plain `transformers`, refused, or different."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import family_matrix
import models
import torch
import transformers
from transformers import PreTrainedModel

from engine import Completion, Engine, Job
from engine.errors import CheckpointError, UnsupportedError
from flexgen_helm.checking.random_model import save_small, save_with_tokenizer

CASES = family_matrix.cases()
POLICIES: tuple[dict[str, Any], ...] = (
    {"percent": [100, 0, 100, 0, 100, 0]},
    {"percent": [50, 50, 50, 50, 50, 50], "gpu-batch-size": 2, "num-gpu-batches": 2},
)
TOLERANCE = 1e-4


def _words(count: int, first: int = 0) -> list[int]:
    return [3 + (first + 37 * at * at + 11 * at) % 480 for at in range(count)]


_SHARED = _words(24, 5)
JOBS = [
    Job(prompt=[*_SHARED, *_words(5, 1)], max_new_tokens=3, prompt_logprobs=True),
    Job(prompt=[*_SHARED, *_words(9, 2)], max_new_tokens=3, prompt_logprobs=True),
    Job(prompt=_words(1, 4), max_new_tokens=3),
    Job(prompt=_words(14, 9), max_new_tokens=3),
    Job(prompt=_words(41, 7), max_new_tokens=3, prompt_logprobs=True),
    Job(prompt=_words(37, 8), max_new_tokens=0, prompt_logprobs=True),
]
"""Longer than every window, with a prefix that two share, and alone."""


def differences(model: PreTrainedModel, jobs: list[Job], done: list[Completion]) -> list[str]:
    """Where completions differ from a plain forward of `model` over the prompt and their own tokens."""
    found = []
    for index, (job, completion) in enumerate(zip(jobs, done, strict=True)):
        if completion.error is not None:
            found.append(f"job {index}: {completion.error}")
            continue
        tokens = [*job.prompt, *completion.tokens]
        with torch.no_grad():
            logprobs = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        for at, (token, value) in enumerate(zip(completion.tokens, completion.logprobs, strict=True), len(job.prompt)):
            apart = float(
                max(logprobs[at - 1].max() - logprobs[at - 1, token], (logprobs[at - 1, token] - value).abs())
            )
            if not apart <= TOLERANCE:
                found.append(f"job {index} ({len(job.prompt)} tokens): token {at} differs by {apart:.2g}")
        if completion.finish_reason != "length" and job.max_new_tokens:
            ending = float(logprobs[-1].max() - logprobs[-1, 2])
            if not ending <= TOLERANCE:
                found.append(f"job {index}: it ended {ending:.2g} too soon")
        for at, scored in enumerate(completion.prompt_logprobs or ()):
            if scored is not None and not abs(scored - float(logprobs[at - 1, job.prompt[at]])) <= TOLERANCE:
                found.append(f"job {index} ({len(job.prompt)} tokens): prompt token {at} differs")
    return found


def outcome(name: str, folder: Path) -> str:
    """What becomes of a case: "equal", the one line of its refusal, or what differs."""
    model_type, changes = CASES[name]
    config, directory = models.small_config_of(model_type, **changes), folder / "model"
    if "architectures" in changes:  # of a class with encoders, whose type has one without
        torch.manual_seed(0)
        save_with_tokenizer(directory, getattr(transformers, changes["architectures"][0])(config))
    else:
        save_small(directory, config)
    for policy in POLICIES:
        settings = {"device": "cpu", "offload-dir": str(folder / "offload"), **policy}
        try:
            engine = Engine.from_pretrained(str(directory), policy=settings)
        except (UnsupportedError, CheckpointError) as error:
            return str(error).replace(str(directory), "DIR")
        with engine:
            together, alone = engine.run(JOBS), [engine.run([job])[0] for job in JOBS[:2]]
        model = models.load_reference(directory)
        found = [*differences(model, JOBS, together), *differences(model, JOBS[:2], alone)]
        if found:
            return "; ".join(found[:3])
    return "equal"
