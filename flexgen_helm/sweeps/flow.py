"""The order of a suite's work: requests are made ahead of the engine, and runs are finished after it."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from helm.benchmark.run_spec import RunSpec

from flexgen_helm.helm.client import FlexGenClient
from flexgen_helm.helm.feeding import Feed
from flexgen_helm.helm.requests.asked import Answer
from flexgen_helm.sweeps.beside.helm_side import Made, unpack
from flexgen_helm.sweeps.model_sweep import ModelSweep, PendingRun
from flexgen_helm.sweeps.parts import Helpers, RunSide, Watcher
from flexgen_helm.workers.engine_guard import EngineElsewhere
from flexgen_helm.workers.helper_processes import Here

FIRST_TOKENS = 1 << 20
"""The least tokens of requests that are made before a model is loaded: they determine its policy."""
MOST_TOKENS = 1 << 22
"""The most tokens of requests that are made and not answered, unless the engine's sweeps are larger."""
_SWEEPS_AHEAD = 3
"""Sweeps that the unanswered requests should fill: one is computed, one is next, one is being made."""


@dataclass(eq=False)
class _Turn:
    """A model's part of the flow, before and after its engine is open."""

    deployment: str
    unmade: deque[RunSpec]
    """The runs whose requests are not being made yet."""
    left: dict[str, None]
    """Runs that have not ended."""
    to_make: int
    """Runs that are not made."""
    num_runs: int
    model: ModelSweep | None = None
    is_foretelling: bool = False
    """Whether the forecast of its requests is being computed."""
    finishing: set[str] = field(default_factory=set)
    """Runs whose answers are complete."""


class Flow:
    """Takes runs of our client through making, answering and finishing: model by model, the longest answers first.

    Requests are made ahead, also of later models, up to `MOST_TOKENS` or a few sweeps of the engine. They are submitted
    in whole sweeps, so that none is computed half empty. Runs are finished while the engine continues.
    """

    def __init__(
        self,
        run_specs: Sequence[RunSpec],
        client_of: Callable[[str], FlexGenClient],
        helpers: Helpers,
        here: RunSide,
        watcher: Watcher,
        deployment_of: Callable[[RunSpec], str] = lambda run_spec: str(run_spec.adapter_spec.model_deployment),
    ) -> None:
        """`client_of` returns the client of a deployment; `here` does what needs an engine, which helpers do not have.

        `deployment_of` returns the deployment that answers a run's requests.
        """
        self._client_of = client_of
        self._helpers = helpers
        self._here = here
        self._watcher = watcher
        by_deployment: dict[str, list[RunSpec]] = {}
        for run_spec in run_specs:
            by_deployment.setdefault(deployment_of(run_spec), []).append(run_spec)
        for specs in by_deployment.values():  # short answers are computed in the sweeps of long ones
            specs.sort(key=lambda run_spec: -run_spec.adapter_spec.max_tokens)
        self._turns = [
            _Turn(deployment, deque(specs), dict.fromkeys(each.name for each in specs), len(specs), len(specs))
            for deployment, specs in by_deployment.items()
        ]
        self._finishing: list[tuple[_Turn, PendingRun]] = []
        """The runs that are fully answered, and not being finished yet."""
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        """Functions to call in this thread."""
        self._feed: Feed | None = None

    def run(self) -> None:
        """Run everything; returns when every run has ended. Raises what the watcher raises."""
        for turn in self._turns:
            while turn.model is None and turn.left:
                self._step()
            model = turn.model
            if model is None:
                continue
            with Feed(model.client, model.tally.observe, partial(self._hear, turn)) as self._feed:
                has_begun = False
                while turn.left or turn.is_foretelling:
                    if not has_begun and (turn.to_make == 0 or model.waiting_tokens >= FIRST_TOKENS):
                        has_begun = True
                        self._watcher.begin(model)
                    if has_begun:
                        self._hand_over(turn, model, self._feed)
                    self._step()
            self._feed = None
            self._watcher.end(model)

    def _step(self) -> None:
        """Do one thing: first handle what has arrived, then start a task, then wait for something to arrive."""
        try:
            self._inbox.get_nowait()()
        except queue.Empty:
            if not self._start_task():
                self._inbox.get()()

    def _hand_over(self, turn: _Turn, model: ModelSweep, feed: Feed) -> None:
        """Submit requests that fill the engine's sweeps; all of them at first, and when no more will come."""
        is_all = turn.to_make == 0 or feed.sweep is None
        if feed.is_asked and not feed.is_open and turn.to_make > 0:
            return  # what fills its sweeps is not known yet
        works = model.take(None if is_all else feed.sweep)
        if works:
            feed.ask(works, max(0.001, 1 - turn.to_make / turn.num_runs))

    def _hear(self, turn: _Turn, told: list[Answer] | BaseException) -> None:
        self._inbox.put(partial(self._heard, turn, told))

    def _heard(self, turn: _Turn, told: list[Answer] | BaseException) -> None:
        assert turn.model is not None
        if isinstance(told, BaseException):
            if not isinstance(told, Exception):
                raise told
            self._watcher.fault(told)
            turn.to_make = 0
            turn.unmade.clear()
            turn.model.give_up()
            for name in [name for name in turn.left if name not in turn.finishing]:
                self._fail(turn, name, told)
            return
        for answer in told:
            whole = turn.model.deliver(answer)
            self._watcher.answered(turn.model, answer)
            for run in whole:
                self._whole(turn, run)

    # Making and finishing

    def _start_task(self) -> bool:
        """Start the next task, if a helper is free and there is one."""
        if self._helpers.num_free < 1:
            return False
        turn = self._to_make()
        if turn is not None and (not self._finishing or self._is_hungry()):
            self._make(turn)
        elif self._finishing:
            longest = max(self._finishing, key=lambda each: each[1].total)
            self._finishing.remove(longest)  # otherwise everything would wait for it at the end
            self._finish(*longest)
        else:
            return False
        return True

    def _is_hungry(self) -> bool:
        """Whether the engine may soon run out of work; complete runs may wait meanwhile."""
        return self._num_tokens() < FIRST_TOKENS * self._num_workers and len(self._finishing) < 2 * max(
            1, self._helpers.num_free
        )

    def _to_make(self) -> _Turn | None:
        """Return the run whose requests are made next; None if enough requests, or all, are made."""
        turn = next((turn for turn in self._turns if turn.unmade), None)
        if turn is None or self._num_tokens() < MOST_TOKENS:
            return turn
        sweep = None if self._feed is None else self._feed.sweep
        current = next(turn for turn in self._turns if turn.left)
        if sweep is None or current is not turn or turn.model is None:
            return None
        return None if turn.model.under_way.fills(sweep, _SWEEPS_AHEAD * self._num_workers) else turn

    @property
    def _num_workers(self) -> int:
        return 1 if self._feed is None else self._feed.num_workers

    def _num_tokens(self) -> int:
        """The tokens of requests that are made and not answered."""
        return sum(turn.model.under_way.tokens for turn in self._turns if turn.model is not None)

    def _make(self, turn: _Turn) -> None:
        run_spec = turn.unmade.popleft()
        self._watcher.preparing(run_spec)
        self._helpers.start("make", run_spec, then=partial(self._then, self._made, turn, run_spec))

    def _then(self, do: Callable[..., None], *args: Any) -> None:
        """Call `do` in the thread of the flow."""
        self._inbox.put(partial(do, *args))

    def _made(self, turn: _Turn, run_spec: RunSpec, made: Made | BaseException) -> None:
        name = run_spec.name
        try:
            if isinstance(made, EngineElsewhere):
                made = self._here.make(run_spec)
            if isinstance(made, BaseException):
                raise made
            if name in turn.left:
                if turn.model is None:
                    turn.model = ModelSweep(turn.deployment, self._client_of(turn.deployment))
                run = turn.model.add(name, made.adapted, made.entries)
                self._watcher.prepared(run)
                if run.is_answered:
                    self._whole(turn, run)
        except Exception as error:
            self._fail(turn, name, error)
        is_last = turn.to_make == 1
        turn.to_make = max(0, turn.to_make - 1)
        if is_last and turn.model is not None:
            self._foretell(turn, turn.model)

    def _foretell(self, turn: _Turn, model: ModelSweep) -> None:
        """Estimate what a model's requests will take; this takes seconds, during which the flow continues."""
        jobs, model.jobs = model.jobs, []
        turn.is_foretelling = True

        def foresee() -> None:
            found: Future[Callable[[], None]] = Future()
            try:
                found.set_result(self._watcher.foresee(model, jobs))
            except BaseException as error:
                found.set_exception(error)
            self._inbox.put(partial(self._foretold, turn, found))

        if isinstance(self._helpers, Here):  # a model's sizes are found under torch's default dtype, which is global
            self._inbox.put(foresee)  # after the requests that the engine gets
        else:
            threading.Thread(target=foresee, name="flexgen-forecast", daemon=True).start()

    def _foretold(self, turn: _Turn, found: Future[Callable[[], None]]) -> None:
        turn.is_foretelling = False
        found.result()()

    def _whole(self, turn: _Turn, run: PendingRun) -> None:
        turn.finishing.add(run.name)
        self._finishing.append((turn, run))

    def _finish(self, turn: _Turn, run: PendingRun) -> None:
        assert turn.model is not None
        outcomes = [run.outcomes[place] for place in range(run.total)]
        args = (run.adapted, outcomes, turn.model.client.known_identity)
        run.adapted = None
        self._helpers.start("finish", *args, then=partial(self._then, self._finished, turn, run, args))

    def _finished(self, turn: _Turn, run: PendingRun, args: tuple[Any, ...], outcome: BaseException | None) -> None:
        if isinstance(outcome, EngineElsewhere):
            adapted, *others = args
            try:
                self._here.finish(unpack(adapted), *others)
                outcome = None
            except Exception as error:
                outcome = error
        if isinstance(outcome, Exception):
            self._fail(turn, run.name, outcome)
        elif outcome is not None:
            raise outcome
        else:
            self._watcher.ended(run)
            turn.left.pop(run.name, None)
        run.outcomes.clear()

    def _fail(self, turn: _Turn, name: str, error: Exception) -> None:
        if name in turn.left:
            del turn.left[name]
            self._watcher.failed(name, error)
