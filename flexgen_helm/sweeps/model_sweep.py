"""One model's part of a suite: the requests of all its runs in one call of the engine, each run told when whole."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from helm.benchmark.adaptation.request_state import RequestState
from helm.common.request import RequestResult

from flexgen_helm.helm.client import FlexGenClient
from flexgen_helm.helm.requests.asked import Answer, Asked, raise_first
from flexgen_helm.helm.requests.carrying import Carrier
from flexgen_helm.helm.two_step_runner import Adapted
from flexgen_helm.sweeps.tally import Tally


@dataclass(eq=False)
class PendingRun:
    """A run whose requests are under way."""

    adapted: Adapted
    first: int
    """Place of its first request among the model's."""
    total: int
    cached: int
    results: dict[int, RequestResult] = field(default_factory=dict)
    """By place within the run."""
    new_tokens: int = 0

    @property
    def name(self) -> str:
        """HELM's name of it."""
        return str(self.adapted.run_spec.name)

    @property
    def is_answered(self) -> bool:
        """Whether all its requests are."""
        return len(self.results) == self.total

    @property
    def num_failed(self) -> int:
        """Its requests that the engine could not answer."""
        return sum(not result.success for result in self.results.values())

    @property
    def states(self) -> list[RequestState]:
        """Its requests, as HELM made them."""
        states: list[RequestState] = self.adapted.state.request_states
        return states


class ModelSweep:
    """All requests of the runs of one deployment."""

    def __init__(self, deployment: str, client: FlexGenClient) -> None:
        self.deployment = deployment
        self.client = client
        self.asked = Asked()
        self.runs: list[PendingRun] = []
        self._firsts: list[int] = []
        self.tally = Tally()
        self.cached = 0
        """Requests that HELM's cache answered."""

    def add(self, adapted: Adapted) -> PendingRun:
        """Look a run's requests up; raises `EngineError` if one of them cannot be run, or for a fault of the model."""
        found = self.client.look_up([state.request for state in adapted.state.request_states])
        raise_first(found.refused, found.total)
        known = found.known
        run = PendingRun(adapted, self.asked.total, found.total, len(known), results=dict(known))
        found.known = {}
        self.asked.add(found)
        self.cached += run.cached
        self.runs.append(run)
        self._firsts.append(run.first)
        return run

    @property
    def num_requests(self) -> int:
        """Requests of all its runs."""
        return self.asked.total

    def answered(self, on_answer: Callable[[Answer], None]) -> Generator[PendingRun, None, None]:
        """Yield each run as soon as its last request is answered; `on_answer` is called for every answer.

        The engine goes on, and answers are kept in HELM's cache, whatever the caller does with a run: both happen in
        threads of their own. Raises `EngineError` for a fault of the engine; what was answered by then is kept.
        """
        self.tally.restart()
        with Carrier(lambda: self.client.carry_out(self.asked, self.tally.observe), self.client.close) as carrier:
            yield from [run for run in self.runs if run.is_answered]
            for answers in carrier:
                whole: dict[int, PendingRun] = {}
                for answer in answers:
                    self.tally.answered(answer)
                    whole.update(self._deliver(answer))
                    on_answer(answer)
                yield from whole.values()

    def runs_of(self, answer: Answer) -> list[PendingRun]:
        """The runs that asked for it, one for each of its places."""
        return [self.runs[bisect_right(self._firsts, place) - 1] for place in answer.places]

    def _deliver(self, answer: Answer) -> dict[int, PendingRun]:
        """Give an answer to the runs that asked for it; returns those that it makes whole."""
        whole = {}
        for place, run in zip(answer.places, self.runs_of(answer), strict=True):
            run.results[place - run.first] = answer.result
            run.new_tokens += answer.new_tokens
            if run.is_answered:
                whole[id(run)] = run
        return whole
