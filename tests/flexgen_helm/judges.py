"""A model that answers at random, and a judge whose verdicts follow from what it is asked, so that scores are known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from fake_engine import FakeEngine
from helm.clients.client import Client
from helm.common.request import GeneratedOutput, Request, RequestResult

from engine import Completion, Job

OPENING, ENDING = "[user] ", "\n[assistant]"
CHAT_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"
UNREADABLE = "I would rather not say."
CUT_OFF = "##short_reasoning: so ##the_score: 0."
"""A verdict of which the rest, say a 5, had no room."""


def number_of(prompt: str) -> int:
    """What verdicts on a prompt follow from."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")


def safety(number: int) -> str:
    """As HELM's Safety annotators want it; every third verdict cannot be read."""
    if number % 3 == 0:
        return UNREADABLE
    return f"<reasoning>so</reasoning><score>{(number % 5) / 4}</score>"


def wildbench(number: int) -> str:
    """As WildBench's annotator wants it."""
    told = {"strengths": "short", "weaknesses": "wrong", "score": str(1 + number % 10)}
    return UNREADABLE if number % 3 == 0 else json.dumps(told)


def omni_math(number: int) -> str:
    """As Omni-MATH's annotator wants it."""
    told = "## Student Final Answer\n{}\n\n## Equivalence Judgement\n{}\n\n## Justification\nSo.\n=== report over ==="
    return UNREADABLE if number % 3 == 0 else told.format(number, "TRUE" if number % 2 else "FALSE")


def air_bench(number: int) -> str:
    """As AIR-Bench's annotator wants it."""
    return UNREADABLE if number % 3 == 0 else f"##short_reasoning: so ##the_score: {(number % 5) / 4}"


def jury(number: int) -> str:
    """As MedHELM's annotators want it."""
    told = {
        each: {"score": 1 + (number + place) % 5, "explanation": "so"}
        for place, each in enumerate(("accuracy", "completeness", "clarity"))
    }
    return UNREADABLE if number % 3 == 0 else json.dumps(told)


FORMS = {  # of prompts of HELM's annotators: each has words that no other has
    "##short_reasoning": air_bench,
    "Was ": air_bench,
    "# Instruction": wildbench,
    "Equivalence Judgement": omni_math,
    "Be a strict doctor": jury,
    "<score>": safety,
}


class JudgeEngine(FakeEngine):
    """Reads its prompts, and answers those of HELM's annotators with verdicts in the form that they ask for."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.asked: list[str] = []
        """Prompts without their chat template, as they come."""

    def answer(self, job: Job) -> Completion:
        prompt = self.tokenizer.decode(job.prompt).removeprefix(OPENING).removesuffix(ENDING)
        self.asked.append(prompt)
        text = verdict_on(prompt)
        reason = "length" if text == CUT_OFF else "stop"
        return Completion(text=text, tokens=(10,), logprobs=(-0.5,), finish_reason=reason)


def verdict_on(prompt: str) -> str:
    """The judge's answer to a prompt."""
    make = next(make for words, make in FORMS.items() if words in prompt)
    return str(make(number_of(prompt)))


class Asked(Client):  # type: ignore[misc]
    """In place of HELM's client of all models: the judge's answers, one at a time, whoever is asked."""

    def make_request(self, request: Request) -> RequestResult:
        answer = GeneratedOutput(text=verdict_on(request.prompt), logprob=0, tokens=[])
        return RequestResult(success=True, embedding=[], completions=[answer], cached=False)


def mean(values: Sequence[float]) -> float:
    """Of at least one."""
    return sum(values) / len(values)
