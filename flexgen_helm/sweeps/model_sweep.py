"""One model's part of a suite: the runs whose requests are made, and the requests that are not answered yet."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.errors import EngineError
from engine.job import Job
from engine.schedule.prefix import common_length
from engine.workers.handing_out.sharing_out import Room
from flexgen_helm.helm.client import FlexGenClient
from flexgen_helm.helm.requests.asked import Answer, Work, raise_first
from flexgen_helm.helm.requests.entries import PackedEntries
from flexgen_helm.helm.requests.results import is_cut_off, result
from flexgen_helm.sweeps.beside.helm_side import Outcome
from flexgen_helm.sweeps.record import Lengths
from flexgen_helm.sweeps.tally import Tally


@dataclass(frozen=True)
class Counts:
    """Numbers about a run's answers."""

    failed: tuple[str, ...] = ()
    """The errors of requests without an answer."""
    cut_off: int = 0
    """Answers that are empty because there was no room for more than their thinking."""
    thinking: Lengths | None = None
    """The lengths of thinking; None where there was none, or where the cache does not have all lengths."""


@dataclass(eq=False)
class PendingRun:
    """A run whose requests are in progress."""

    name: str
    """HELM's name of the run."""
    adapted: Any
    """What `finish` needs."""
    first: int
    """Position of its first request among the model's."""
    total: int
    cached: int
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    """The results by position within the run."""
    new_tokens: int = 0

    @property
    def is_answered(self) -> bool:
        """Whether all its requests are answered."""
        return len(self.outcomes) == self.total

    @property
    def counts(self) -> Counts:
        """The counts of the answers so far."""
        outcomes = [self.outcomes[place] for place in sorted(self.outcomes)]
        failed = [f"{type(each).__name__}: {each}" for each in outcomes if isinstance(each, EngineError)]
        responses = [each[0] for each in outcomes if not isinstance(each, EngineError)]
        answers = [each for response in responses for each in result(response, cached=True).completions]
        thought = [each for response in responses for each in response["completions"] if "thinking" in each]
        numbers = [number for each in thought if isinstance(number := each.get("thinking_tokens"), int)]
        return Counts(
            failed=tuple(failed),
            cut_off=sum(map(is_cut_off, answers)),
            thinking=Lengths.of(numbers) if len(numbers) == len(thought) else None,
        )


@dataclass
class Amount:
    """An amount of requests."""

    tokens: int = 0
    """The tokens of prompts, and the most to be generated."""
    jobs: int = 0
    rows: int = 0
    """Approximate prompt tokens to compute, without those shared with the previous request."""

    def add(self, other: Amount, sign: int = 1) -> None:
        """Add another amount, or subtract it."""
        self.tokens += sign * other.tokens
        self.jobs += sign * other.jobs
        self.rows += sign * other.rows

    def fills(self, sweep: Room, count: int = 1) -> bool:
        """Whether it fills `count` of the engine's sweeps."""
        return self.jobs >= count * sweep.jobs or self.rows >= count * sweep.rows


class ModelSweep:
    """The runs of one deployment."""

    def __init__(self, deployment: str, client: FlexGenClient) -> None:
        self.deployment = deployment
        self.client = client
        self.runs: list[PendingRun] = []
        self.tally = Tally()
        self.num_requests = 0
        """The number of requests of all runs so far."""
        self.cached = 0
        """Requests that HELM's cache answered."""
        self.jobs: list[Job] = []
        """The jobs of all requests to be computed, as long as a forecast may be needed."""
        self.num_todo = 0
        """Requests to compute; equal ones count once while they are in progress."""
        self.most_tokens = 0
        """Their tokens: of prompts, and the most that are to be generated."""
        self.under_way = Amount()
        """The requests that are not answered yet."""
        self._under_way: dict[str, Work] = {}
        self._waiting: list[tuple[Work, Amount]] = []
        """Those of them that were not sent to the engine yet."""
        self._amounts: dict[str, Amount] = {}
        self._firsts: list[int] = []

    def add(self, name: str, adapted: Any, entries: PackedEntries) -> PendingRun:
        """Look a run's requests up; raises `EngineError` if one of them cannot be run, or for a fault of the model."""
        found = self.client.find(self.client.unpack(entries), self._under_way)
        raise_first(found.refused, found.total)
        first = self.num_requests
        run = PendingRun(name, adapted, first, found.total, len(found.known))
        run.outcomes = {place: (response, True) for place, response in found.known.items()}
        for joined, places in found.joined.items():
            self._under_way[joined].places += [first + place for place in places]
        before: tuple[int, ...] = ()
        for work in found.todo.values():
            work.places = [first + place for place in work.places]
            rows = work.prompt_rows - len(work.jobs) * common_length(before, work.ids)
            before = work.ids
            self._wait(work, Amount(work.most_tokens, len(work.jobs), max(1, rows)))
        self.num_requests += run.total
        self.cached += run.cached
        self.runs.append(run)
        self._firsts.append(first)
        return run

    def _wait(self, work: Work, amount: Amount) -> None:
        self._under_way[work.name] = work
        self._waiting.append((work, amount))
        self._amounts[work.name] = amount
        self.under_way.add(amount)
        self.jobs += work.jobs
        self.num_todo += 1
        self.most_tokens += amount.tokens

    @property
    def waiting_tokens(self) -> int:
        """The tokens of requests that were not sent to the engine."""
        return sum(amount.tokens for _, amount in self._waiting)

    def take(self, sweep: Room | None = None) -> Sequence[Work]:
        """Requests for the engine: as many as fill whole sweeps of this size, or all."""
        filled, number = Amount(), len(self._waiting) if sweep is None else 0
        if sweep is not None:
            for place, (_, amount) in enumerate(self._waiting, start=1):
                filled.add(amount)
                if filled.fills(sweep):
                    filled, number = Amount(), place
        taken, self._waiting = self._waiting[:number], self._waiting[number:]
        return [work for work, _ in taken]

    def deliver(self, answer: Answer) -> list[PendingRun]:
        """Deliver an answer to the runs that wait for it; returns those that are now complete."""
        work = self._under_way.pop(answer.work.name)
        self.under_way.add(self._amounts.pop(work.name), -1)
        self.tally.answered(answer)
        whole: dict[int, PendingRun] = {}
        for place, run in zip(work.places, self.runs_of(answer), strict=True):
            outcome = answer.outcome
            run.outcomes[place - run.first] = outcome if isinstance(outcome, EngineError) else (outcome, False)
            run.new_tokens += answer.new_tokens
            if run.is_answered:
                whole[id(run)] = run
        return list(whole.values())

    def give_up(self) -> None:
        """Drop the unanswered requests, because no answers will come."""
        self._waiting, self._under_way, self._amounts, self.jobs = [], {}, {}, []
        self.under_way = Amount()

    def runs_of(self, answer: Answer) -> list[PendingRun]:
        """The runs that wait for an answer, one entry for each position."""
        return [self.runs[bisect_right(self._firsts, place) - 1] for place in answer.work.places]
