"""Requests on their way: what the cache knew, what the engine is asked, and its answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from helm.common.request import Request, RequestResult

from engine.errors import EngineError
from engine.job import Completion, Job
from engine.schedule.prefix import common_length
from flexgen_helm.helm.requests.results import Response, failure, result
from flexgen_helm.helm.requests.translate import Key


@dataclass(eq=False, kw_only=True)
class Work:
    """A request that is not in the cache, and the places of all requests that are equal to it."""

    request: Request
    key: Key
    """In the cache, but for the identity of the model."""
    places: list[int]
    ids: tuple[int, ...]
    jobs: list[Job]
    completions: dict[int, Completion] = field(default_factory=dict)

    @property
    def prompt_tokens(self) -> int:
        """Of its prompt, for each of its jobs."""
        return len(self.ids) * len(self.jobs)

    @property
    def prompt_rows(self) -> int:
        """Prompt tokens that the layers would see if nothing were shared: a last one that is only scored is not fed."""
        return sum(len(self.ids) - (job.max_new_tokens == 0) for job in self.jobs)

    @property
    def most_tokens(self) -> int:
        """Of its prompts, and at most to be generated."""
        return self.prompt_tokens + sum(job.max_new_tokens for job in self.jobs)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the engine answered."""

    places: tuple[int, ...]
    """Of the requests that it answers."""
    result: RequestResult
    prompt_tokens: int
    prompt_rows: int
    new_tokens: int
    most_tokens: int
    """Prompt tokens, and new ones as many as it was allowed."""

    @classmethod
    def of(cls, work: Work, response: Response | EngineError) -> Answer:
        """What the engine made of `work`: a response, or why there is none."""
        return cls(
            places=tuple(work.places),
            result=failure(work.request, response)
            if isinstance(response, EngineError)
            else result(response, cached=False),
            prompt_tokens=work.prompt_tokens,
            prompt_rows=work.prompt_rows,
            new_tokens=sum(len(completion.tokens) for completion in work.completions.values()),
            most_tokens=work.most_tokens,
        )


@dataclass(eq=False, kw_only=True)
class Asked:
    """Requests that were looked up, by their places."""

    total: int = 0
    known: dict[int, RequestResult] = field(default_factory=dict)
    """From the cache."""
    refused: dict[int, EngineError] = field(default_factory=dict)
    """Those that cannot be run."""
    todo: dict[str, Work] = field(default_factory=dict)
    """What is left for the engine, by a digest of its key in the cache: equal requests are asked once."""

    def add(self, other: Asked) -> int:
        """Append other requests; returns the place of the first of them."""
        first = self.total
        self.total += other.total
        self.known.update({first + place: known for place, known in other.known.items()})
        self.refused.update({first + place: error for place, error in other.refused.items()})
        for name, work in other.todo.items():
            work.places = [first + place for place in work.places]
            if name in self.todo:
                self.todo[name].places += work.places
            else:
                self.todo[name] = work
        return first

    @property
    def most_tokens(self) -> int:
        """Of what is left: in prompts, and at most to be generated."""
        return sum(work.most_tokens for work in self.todo.values())

    @property
    def shared_tokens(self) -> int:
        """Prompt tokens of what is left that its neighbours in sorted order begin with too."""
        ordered = sorted(work.ids for work in self.todo.values())
        shared = sum(common_length(left, right) for left, right in pairwise(ordered))
        return shared + sum(len(work.ids) * (len(work.jobs) - 1) for work in self.todo.values())


def raise_first(refused: Mapping[int, EngineError], total: int) -> None:
    """Raise the first of these errors, with how many there are; the keys are places among `total` requests."""
    if refused:
        place = min(refused)
        first = refused[place]
        raise type(first)(f"{len(refused)} of {total} requests cannot be run; number {place + 1}: {first}")
