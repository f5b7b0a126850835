"""Records the engine's answers to a run's requests, with the completions from which the results are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.run_spec import RunSpec

from engine.checkpoint.identity.result import Identity
from engine.job import Completion, Job
from engine.schedule.timing import SweepTiming
from flexgen_helm.helm.client import FlexGenClient
from flexgen_helm.helm.engines import engines
from flexgen_helm.helm.runner import WholeRunExecutor
from flexgen_helm.workers.running_engine import RunningEngine

if TYPE_CHECKING:
    from engine.verification.layerwise import Findings


@dataclass(frozen=True)
class Answered:
    """A run as our engine answered it."""

    run_spec: RunSpec
    state: ScenarioState
    client: FlexGenClient
    completions: dict[str, Completion]
    """The completions by `_name` of their jobs."""
    identity: Identity
    """The identity of the weights that answered."""

    def completion_of(self, job: Job) -> Completion:
        """Return our engine's completion of a job."""
        return self.completions[_name(job)]

    def answers(self) -> Iterator[tuple[Job, Completion]]:
        """Yield every job of a request that did not fail, with its completion."""
        translator = self.client._translator
        for state in self.state.request_states:
            if state.result is not None and state.result.success:
                text = translator.render(state.request)
                for job in translator.jobs(state.request, text, translator.encode(state.request, text)):
                    yield job, self.completion_of(job)


class RecordingExecutor(WholeRunExecutor):
    """Records a run's results and completions, because HELM's results have no token ids."""

    _state: ScenarioState
    _completions: dict[str, Completion]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Make every engine that is loaded meanwhile report its completions, and close it at the end."""
        load = engines.load
        engines.close()  # an engine that is loaded already would not report
        engines.load = lambda path, policy, window: _Recorded(load(path, policy, window), self)
        try:
            yield
        finally:
            engines.close()
            engines.load = load

    def execute(self, scenario_state: ScenarioState) -> ScenarioState:
        """Execute, and keep the result until `take`."""
        self._completions = {}
        self._state = super().execute(scenario_state)
        return self._state

    def note(self, job: Job, completion: Completion) -> None:
        """Record a completion of the current run."""
        self._completions[_name(job)] = completion

    def take(self, run_spec: RunSpec) -> Answered:
        """Return the recorded result of the run that was executed last."""
        client = self.client_of(self._state.request_states)
        assert client is not None, "run_all has looked at the deployments"
        return Answered(run_spec, self._state, client, self._completions, client.identity)


class _Recorded:
    """An engine that reports its completions to a recording executor."""

    def __init__(self, engine: RunningEngine, executor: RecordingExecutor) -> None:
        self._engine = engine
        self._executor = executor
        self.observer: Callable[[SweepTiming], None] | None = None

    def sweeps(self, jobs: Sequence[Job]) -> Iterator[list[tuple[int, Completion]]]:
        """See the engine's method."""
        asked = list(jobs)  # the caller releases its list
        for finished in self._engine.sweeps(asked):
            for index, completion in finished:
                self._executor.note(asked[index], completion)
            yield finished

    def weights_digest(self) -> str | None:
        """See the engine's method."""
        return self._engine.weights_digest()

    def compare_with_stock(
        self, jobs: Sequence[Job], completions: Sequence[Completion], progress: Callable[[int, int], None]
    ) -> Findings:
        """See the engine's method."""
        return self._engine.compare_with_stock(jobs, completions, progress)

    def close(self) -> None:
        """See the engine's method."""
        self._engine.close()


def _name(job: Job) -> str:
    """A key for jobs; they contain lists, so they cannot be keys themselves."""
    return repr(job)
