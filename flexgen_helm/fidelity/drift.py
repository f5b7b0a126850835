"""How near a run's results are to the reference's: request by request, summed up, as a record and as a table."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError
from engine.job import Completion, Job
from flexgen_helm.fidelity.reference import Forced, Reference
from flexgen_helm.helm.scores import Score, short_name
from flexgen_helm.helm.translate import Timing, Translator, result
from flexgen_helm.terminal.columns import columns

if TYPE_CHECKING:
    from helm.benchmark.adaptation.request_state import RequestState

FILE_NAME = "fidelity.json"
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2}
"""Largest difference of a log-probability that is put down to rounding, by dtype: sums have another order here.

A limit, not a law: in 16 bits, models with large logits round more than that, in bfloat16 above all."""
NUM_WORST = 5


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One token's log-probability, here and there."""

    instance_id: str | None
    train_trial_index: int
    reference_index: int | None
    """Of the instance's references, where each has a request of its own."""
    part: str
    """"prompt" or "completion"."""
    position: int
    """Of the token in that part."""
    ours: float
    reference: float

    @property
    def size(self) -> float:
        """The absolute difference."""
        return abs(self.ours - self.reference)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A completion of ours beside the reference."""

    worst: Difference | None
    """None where there is no log-probability to compare."""
    num_logprobs: int
    sum_of_differences: float
    is_sampled: bool
    """Sampled (or penalized) tokens are ours alone, so that only their log-probabilities are compared."""
    num_agreeing: int = 0
    """Greedy tokens up to the first that differs."""
    num_tokens: int = 0
    """Greedy tokens of the longer of the two completions."""
    same_text: bool | None = None
    """None where nothing is decoded greedily."""
    margin: float = 0.0
    """Where tokens differ: by how much log-probability the reference prefers its own to the next likely token."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All of a run's requests beside the reference, and the run's states with the reference's results."""

    compared: list[Compared]
    states: list[RequestState]
    """Those of sampled requests, and of requests that fail there too, are as they were."""
    num_requests: int
    """Compared ones; failed ones have nothing to compare."""
    num_failed: int
    """Requests that our engine did not answer."""
    num_failed_here: int
    """Those of them that the reference does answer; it is not asked for sampled ones."""


def compare(
    states: Sequence[RequestState],
    completion_of: Callable[[Job], Completion],
    translator: Translator,
    reference: Reference,
    progress: Callable[[int, int, int], None] = lambda done, total, tokens: None,
) -> Comparison:
    """Compute each request of a run by the reference and compare.

    `states` are the run's, with our results; `completion_of` gives what our engine made of a job, ids and all, which
    HELM's results have not. The reference sees the very ids that our engine saw. Its log-probabilities are those of
    our tokens, so that a divergence does not spoil the comparison of what follows it.
    """
    compared: list[Compared] = []
    theirs: list[RequestState] = []
    num_failed = num_failed_here = num_tokens = 0
    for number, state in enumerate(states, start=1):
        request = state.request
        answers: list[Completion] = []
        started, is_sampled = time.time(), False
        if state.result is not None and state.result.success:
            text = translator.render(request)
            ids = translator.encode(text)
            for job in translator.jobs(request, text, ids):
                one, answer = _compare_job(state, job, completion_of(job), reference)
                compared.append(one)
                answers.append(answer)
                is_sampled |= one.is_sampled
        else:
            num_failed += 1
            try:
                text = translator.render(request)
                ids = translator.encode(text)
                jobs = translator.jobs(request, text, ids)
                is_sampled = not all(map(_is_greedy, jobs))
                answers = [] if is_sampled else [_answer(job, reference) for job in jobs]
                num_failed_here += not is_sampled
            except EngineError:
                answers = []  # it fails there too
        if answers and not is_sampled:
            timing = Timing(seconds=time.time() - started, started=started, num_requests=1)
            response = translator.response(request, ids, answers, timing)
            state = replace(state, result=result(response, cached=False))
        theirs.append(state)
        num_tokens += sum(len(ids) + len(answer.tokens) for answer in answers)
        progress(number, len(states), num_tokens)
    return Comparison(
        compared=compared,
        states=theirs,
        num_requests=len(states) - num_failed,
        num_failed=num_failed,
        num_failed_here=num_failed_here,
    )


def _is_greedy(job: Job) -> bool:
    """Whether the reference can tell the job's tokens (those of a job that generates none, too)."""
    sampling = job.sampling
    return job.max_new_tokens == 0 or not (
        sampling.temperature or sampling.presence_penalty or sampling.frequency_penalty
    )


def _answer(job: Job, reference: Reference) -> Completion:
    """What the reference answers to a greedy job; `EngineError` where it is not finite."""
    decoded = reference.greedy(job) if job.max_new_tokens else Completion(finish_reason="length")
    forced = reference.force(job, decoded.tokens)
    return replace(decoded, logprobs=forced.logprobs, prompt_logprobs=forced.prompt_logprobs)


def _compare_job(state: RequestState, job: Job, ours: Completion, reference: Reference) -> tuple[Compared, Completion]:
    """Compare one completion; returns with it what the reference answers (of a sampled job: our tokens, forced)."""
    forced = reference.force(job, ours.tokens)
    differences = list(_differences(state, ours, forced))
    is_greedy = _is_greedy(job)
    compared = Compared(
        worst=max(differences, key=lambda each: each.size, default=None),
        num_logprobs=len(differences),
        sum_of_differences=math.fsum(each.size for each in differences),
        is_sampled=not is_greedy,
    )
    answer = replace(ours, logprobs=forced.logprobs, prompt_logprobs=forced.prompt_logprobs)
    if job.max_new_tokens == 0 or not is_greedy:
        return compared, answer
    decoded = reference.greedy(job)
    num_agreeing = _common_prefix(ours.tokens, decoded.tokens)
    compared = replace(
        compared,
        num_agreeing=num_agreeing,
        num_tokens=max(len(ours.tokens), len(decoded.tokens)),
        same_text=ours.text == decoded.text,
    )
    if decoded.tokens != ours.tokens:
        compared = replace(compared, margin=forced.margins[num_agreeing])
        forced = reference.force(job, decoded.tokens)
    return compared, replace(decoded, logprobs=forced.logprobs, prompt_logprobs=forced.prompt_logprobs)


def _differences(state: RequestState, ours: Completion, forced: Forced) -> Iterator[Difference]:
    pairs = {
        "prompt": (ours.prompt_logprobs or (), forced.prompt_logprobs or ()),
        "completion": (ours.logprobs, forced.logprobs),
    }
    for part, (here, there) in pairs.items():
        for position, (mine, its) in enumerate(zip(here, there, strict=True)):
            if mine is not None and its is not None:
                yield Difference(
                    instance_id=state.instance.id,
                    train_trial_index=state.train_trial_index,
                    reference_index=state.reference_index,
                    part=part,
                    position=position,
                    ours=mine,
                    reference=its,
                )


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    length = min(len(one), len(other))
    return next((place for place in range(length) if one[place] != other[place]), length)


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """A run beside the reference, summed up."""

    comparison: Comparison
    score: Score
    """Ours, as HELM computed it."""
    reference_score: float | None
    """The same metric of the reference's results; None where it is not defined (sampled requests)."""
    dtype: str

    @property
    def tolerance(self) -> float:
        """Largest difference of a log-probability that rounding explains."""
        return TOLERANCES[self.dtype]

    @property
    def is_sampled(self) -> bool:
        """Whether any of the requests is."""
        return any(each.is_sampled for each in self.comparison.compared)

    @property
    def score_difference(self) -> float | None:
        """Ours minus the reference's."""
        if self.score.value is None or self.reference_score is None:
            return None
        return self.score.value - self.reference_score

    @property
    def worst(self) -> list[Difference]:
        """The largest differences, one of each request and completion, largest first."""
        found = [each.worst for each in self.comparison.compared if each.worst is not None]
        return sorted(found, key=lambda each: -each.size)

    @property
    def largest_difference(self) -> float | None:
        """Of all log-probabilities; None where there are none."""
        return self.worst[0].size if self.worst else None

    @property
    def mean_difference(self) -> float | None:
        """Of all log-probabilities; None where there are none."""
        count = self.num_logprobs
        return math.fsum(each.sum_of_differences for each in self.comparison.compared) / count if count else None

    @property
    def num_logprobs(self) -> int:
        """Compared ones."""
        return sum(each.num_logprobs for each in self.comparison.compared)

    @property
    def tokens(self) -> tuple[int, int]:
        """Greedy tokens before the first that differs, of how many."""
        compared = self.comparison.compared
        return sum(each.num_agreeing for each in compared), sum(each.num_tokens for each in compared)

    @property
    def texts(self) -> tuple[int, int]:
        """Greedy completions with identical text, of how many."""
        told = [each.same_text for each in self.comparison.compared if each.same_text is not None]
        return sum(told), len(told)

    @property
    def num_unexplained(self) -> int:
        """Divergent completions at whose first differing token the reference is not near a tie.

        Rounding may move each of two log-probabilities by the tolerance, so a tie is near within twice that.
        """
        return sum(each.margin > 2 * self.tolerance for each in self.comparison.compared)

    @property
    def has_drifted(self) -> bool:
        """Whether there is more between the two than rounding explains."""
        differs = (self.largest_difference or 0.0) > self.tolerance or self.num_unexplained > 0
        return differs or self.comparison.num_failed_here > 0

    @property
    def verdict(self) -> str:
        """The finding in a few words."""
        if self.has_drifted:
            return "drift"
        return "within rounding" if self.num_logprobs else "nothing compared"

    def figures(self) -> dict[str, Any]:
        """What `fidelity.json` says of the comparison; JSON types only."""
        agreeing, num_tokens = self.tokens
        same, num_texts = self.texts
        return {
            "verdict": self.verdict,
            "score": {
                "metric": self.score.metric,
                "split": self.score.split,
                "ours": self.score.value,
                "reference": self.reference_score,
                "difference": self.score_difference,
            },
            "sampled": self.is_sampled,
            "requests": {
                "compared": self.comparison.num_requests,
                "failed": self.comparison.num_failed,
                "failed_only_here": self.comparison.num_failed_here,
            },
            "logprobs": {
                "compared": self.num_logprobs,
                "largest_difference": self.largest_difference,
                "mean_difference": self.mean_difference,
                "tolerance": self.tolerance,
            },
            "tokens": {"agreeing": agreeing, "compared": num_tokens},
            "texts": {"identical": same, "compared": num_texts, "differing_unexplained": self.num_unexplained},
            "worst": [{**asdict(each), "difference": each.size} for each in self.worst[:NUM_WORST]],
        }

    def drift(self) -> str:
        """What rounding does not explain, with the numbers."""
        same, num_texts = self.texts
        parts = [f"log-probabilities by up to {self.largest_difference or 0.0:.2g}"]
        if num_texts > same:
            parts.append(
                f"{num_texts - same} of {num_texts} texts, {self.num_unexplained} of them where no tie is near"
            )
        if self.comparison.num_failed_here:
            parts.append(f"{self.comparison.num_failed_here} requests, which fail here only")
        if self.score_difference:
            parts.append(f"{self.score.metric} by {self.score_difference:+.3f}")
        return f"drift in {short_name(self.score.run)}: differing are {'; '.join(parts)}"


def verdict(fidelities: Sequence[Fidelity]) -> str:
    """Say whether all differences are within the limits for rounding; a line for each run where they are not."""
    limits = sorted({f"{each.tolerance:g} in {each.dtype}" for each in fidelities})
    limits_told = f"the limits for rounding (log-probabilities: {', '.join(limits)})"
    if drifted := [each for each in fidelities if each.has_drifted]:
        return "\n".join([*(each.drift() for each in drifted), f"more than {limits_told}"])
    num_failed = sum(each.comparison.num_failed for each in fidelities)
    failed = f"; {num_failed} requests failed here and count as empty answers" if num_failed else ""
    if not any(each.num_logprobs for each in fidelities):
        return f"nothing to compare: no request has log-probabilities{failed}"
    return f"no drift: the differences are within {limits_told}{failed}"


def table(fidelities: Sequence[Fidelity]) -> str:
    """Lay the comparisons out in columns; where they are of one model, its name heads the first one."""
    models = {each.score.model for each in fidelities}
    head = models.copy().pop() if len(models) == 1 else "run"
    rows = [
        (
            head,
            "metric",
            "score",
            "reference",
            "difference",
            "logprob max",
            "mean",
            "tokens",
            "texts",
            "requests",
            "failed",
        ),
        *(_row(each, short_name(each.score.run) if len(models) == 1 else each.score.run) for each in fidelities),
    ]
    return columns(rows, 2)


def _row(fidelity: Fidelity, name: str) -> tuple[str, ...]:
    score = "none" if fidelity.score.value is None else f"{fidelity.score.value:.3f}"
    if fidelity.is_sampled:
        reference = difference = "sampled"
    else:
        reference = "none" if fidelity.reference_score is None else f"{fidelity.reference_score:.3f}"
        difference = "none" if fidelity.score_difference is None else f"{fidelity.score_difference:+.3f}"
    logprobs = [
        "none" if each is None else f"{each:.1e}" for each in (fidelity.largest_difference, fidelity.mean_difference)
    ]
    counts = ["sampled" if fidelity.is_sampled and not of else f"{count}/{of}" if of else "none"
              for count, of in (fidelity.tokens, fidelity.texts)]  # fmt: skip
    requests = str(fidelity.comparison.num_requests), str(fidelity.comparison.num_failed)
    return (name, fidelity.score.metric, score, reference, difference, *logprobs, *counts, *requests)


def write_record(run_path: Path, record: Mapping[str, Any]) -> None:
    """Write `fidelity.json` into a run's directory; it is never half written."""
    scratch = run_path / f".{FILE_NAME}.{os.getpid()}"
    try:
        scratch.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        scratch.replace(run_path / FILE_NAME)
    finally:
        scratch.unlink(missing_ok=True)
