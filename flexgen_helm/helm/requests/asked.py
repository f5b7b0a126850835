"""Requests in progress: those that the cache answered, those for the engine, and their answers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from helm.common.request import Request, RequestResult

from engine.errors import EngineError
from engine.job import Completion, Job
from flexgen_helm.helm.batcher import Done
from flexgen_helm.helm.requests.results import Response, Timing, failure, result
from flexgen_helm.helm.requests.translate import Key


@dataclass(eq=False, kw_only=True)
class Work:
    """A request that is not in the cache, and the positions of all requests that equal it."""

    name: str
    """A digest of `key`: equal requests have the same digest."""
    request: Request
    key: Key
    """The key in the cache, without the identity of the model."""
    places: list[int]
    ids: tuple[int, ...]
    jobs: list[Job]
    completions: dict[int, Completion] = field(default_factory=dict)

    @property
    def prompt_tokens(self) -> int:
        """The number of tokens of its prompt, for each of its jobs."""
        return len(self.ids) * len(self.jobs)

    @property
    def prompt_rows(self) -> int:
        """Prompt tokens that the layers compute if nothing is shared: a last token that is only scored is left out."""
        return sum(len(self.ids) - (job.max_new_tokens == 0) for job in self.jobs)

    @property
    def most_tokens(self) -> int:
        """The number of tokens of its prompts, and the most to be generated."""
        return self.prompt_tokens + sum(job.max_new_tokens for job in self.jobs)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the engine answered."""

    work: Work
    outcome: Response | EngineError
    """The entry for the cache, or the error."""
    prompt_tokens: int
    prompt_rows: int
    new_tokens: int
    most_tokens: int
    """Prompt tokens, and the most new tokens that were allowed."""

    @classmethod
    def of(cls, work: Work, outcome: Response | EngineError) -> Answer:
        """Make the answer to `work` from the engine's outcome."""
        return cls(
            work=work,
            outcome=outcome,
            prompt_tokens=work.prompt_tokens,
            prompt_rows=work.prompt_rows,
            new_tokens=sum(len(completion.tokens) for completion in work.completions.values()),
            most_tokens=work.most_tokens,
        )

    @property
    def result(self) -> RequestResult:
        """The answer as HELM's result."""
        if isinstance(self.outcome, EngineError):
            return failure(self.work.request, self.outcome)
        return result(self.outcome, cached=False)


class Portion:
    """Requests that are sent to the engine in one call."""

    def __init__(self, works: list[Work]) -> None:
        self.num_requests = len(works)
        self._started = time.time()
        self._owners: list[tuple[Work, int] | None] = [
            (work, place) for work in works for place in range(len(work.jobs))
        ]
        self.jobs = [job for work in works for job in work.jobs]
        """The jobs, until the engine has them."""

    def take_jobs(self) -> list[Job]:
        """The jobs, once."""
        jobs, self.jobs = self.jobs, []
        return jobs

    def done(self, finished: Iterable[Done]) -> list[tuple[Work, Timing]]:
        """The requests that are answered with what a sweep has finished."""
        whole = []
        for each in finished:
            owner, self._owners[each.index] = self._owners[each.index], None
            assert owner is not None, "a job is answered once"
            work, place = owner
            work.completions[place] = each.completion
            if len(work.completions) == len(work.jobs):
                timing = Timing(seconds=each.seconds, started=self._started, num_requests=self.num_requests)
                whole.append((work, timing))
        return whole


@dataclass(eq=False, kw_only=True)
class Asked:
    """Requests that were looked up, by their positions."""

    total: int = 0
    known: dict[int, Response] = field(default_factory=dict)
    """The answers from the cache."""
    refused: dict[int, EngineError] = field(default_factory=dict)
    """The requests that cannot be run."""
    joined: dict[str, list[int]] = field(default_factory=dict)
    """The requests that another caller is computing, by their names."""
    todo: dict[str, Work] = field(default_factory=dict)
    """The remaining requests for the engine, by name: equal requests are computed once."""

    @property
    def most_tokens(self) -> int:
        """The tokens of the remaining requests: in prompts, and at most to be generated."""
        return sum(work.most_tokens for work in self.todo.values())


def raise_first(refused: Mapping[int, EngineError], total: int) -> None:
    """Raise the first of these errors, with their number; the keys are positions among `total` requests."""
    if refused:
        place = min(refused)
        first = refused[place]
        raise type(first)(f"{len(refused)} of {total} requests cannot be run; number {place + 1}: {first}")
