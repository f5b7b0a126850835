"""The runner behind `flexgen-helm verify`: it keeps what the engine answered and compares it with the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.metrics.metric import create_metric
from helm.benchmark.model_deployment_registry import get_model_deployment
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import remove_stats_nans
from helm.common.general import asdict_without_nones
from helm.common.object_spec import get_class_by_name

from engine.checkpoint.identity.result import Identity
from engine.errors import ConfigError, EngineError
from engine.job import Completion, Job
from engine.policy import Policy
from engine.schedule.timing import SweepTiming
from flexgen_helm.fidelity.comparison import Comparison, compare
from flexgen_helm.fidelity.record import write_record
from flexgen_helm.fidelity.reference import Reference, find_place
from flexgen_helm.fidelity.verdict import Fidelity
from flexgen_helm.helm.client import FlexGenClient
from flexgen_helm.helm.engines import RunningEngine, Served, engines
from flexgen_helm.helm.requests.translate import SEEDS
from flexgen_helm.helm.runner import RunsFailed, WholeRunExecutor
from flexgen_helm.helm.scores import Score, choose, read_scores, short_name
from flexgen_helm.planning.environment import environment
from flexgen_helm.runs.command_line_runner import CommandLineRunner
from flexgen_helm.runs.models import source_of
from flexgen_helm.terminal.progress import Progress


@dataclass(frozen=True)
class Answered:
    """A run as our engine answered it."""

    run_spec: RunSpec
    state: ScenarioState
    client: FlexGenClient
    completions: dict[str, Completion]
    """By `_name` of their jobs."""
    identity: Identity
    """Of the weights that answered."""

    def completion_of(self, job: Job) -> Completion:
        """What our engine made of a job."""
        return self.completions[_name(job)]


class VerifyingRunner(CommandLineRunner):
    """Runs all run specs, then closes our engine and compares with the reference, one loaded model at a time."""

    found: ClassVar[list[Fidelity]] = []
    """On the class, because HELM makes the runner from the class's name."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._recording = self.executor = _RecordingExecutor(self.executor, self._report, self.tell)
        self._answered: list[Answered] = []

    def run_all(self, run_specs: list[RunSpec]) -> None:
        """Run and compare; raises `EngineError` before anything runs if the reference cannot be had.

        Raises `RunsFailed` at the end if a run failed; the others are compared all the same.
        """
        for run_spec in run_specs:
            served = _served(run_spec)
            find_place(served.description, served.policy)
        failed: RunsFailed | None = None
        with self._recording.listening():
            try:
                super().run_all(run_specs)
            except RunsFailed as error:
                failed = error
        self.display.close()
        self._compare()
        if failed is not None:
            raise failed

    def run_one(self, run_spec: RunSpec) -> None:
        """Run one run spec and keep what became of its requests."""
        super().run_one(run_spec)
        self._answered.append(self._recording.take(run_spec))

    def _compare(self) -> None:
        display = Progress(num_runs=len(self._answered))
        order = [answered.run_spec.name for answered in self._answered]
        by_model = sorted(self._answered, key=lambda answered: _served(answered.run_spec).description.path)
        try:
            for served, group in groupby(by_model, key=lambda answered: _served(answered.run_spec)):
                self._compare_model(served, list(group), display)
        finally:
            display.close()
        self.found.sort(key=lambda each: order.index(each.score.run))

    def _compare_model(self, served: Served, runs: list[Answered], display: Progress) -> None:
        try:
            place = find_place(served.description, served.policy)
        except EngineError as error:  # less memory than before the runs: no bad input any more
            raise EngineError(str(error)) from error
        reference = Reference.load(served.description, place)
        for answered in runs:
            run_spec = answered.run_spec
            display.begin(f"reference {short_name(run_spec.name)}")
            translator = answered.client._translator
            comparison = compare(answered.state.request_states, answered.completion_of, translator, reference, display)
            (ours,) = read_scores([run_spec], Path(self.runs_path))
            found = Fidelity(
                comparison=comparison,
                score=ours,
                reference_score=self._score(answered, comparison, ours),
                dtype=place.dtype,
            )
            self.found.append(found)
            record = {
                "run": run_spec.name,
                "model": run_spec.adapter_spec.model,
                "weights": served.description.path,
                "policy": served.policy.as_mapping() or "auto",
                "identity": answered.identity,
                "dtype": place.dtype,
                "reference_device": place.device,
                "seeds": SEEDS,
                **environment().as_mapping(),
                **found.figures(),
            }
            write_record(Path(self._get_run_path(run_spec)), record)

    def _score(self, answered: Answered, comparison: Comparison, ours: Score) -> float | None:
        """The metric of our score, computed by HELM from the reference's results."""
        if any(each.is_sampled for each in comparison.compared):
            return None
        run_spec = answered.run_spec
        state = ScenarioState(
            adapter_spec=answered.state.adapter_spec,
            request_states=comparison.states,
            annotator_specs=answered.state.annotator_specs,
        )
        state = self.annotator_executor.execute(state)
        stats = [
            stat
            for metric_spec in run_spec.metric_specs
            for stat in create_metric(metric_spec)
            .evaluate(state, self.metric_service, self.eval_cache_path, self.executor.execution_spec.parallelism)
            .aggregated_stats
        ]
        mappings = [asdict_without_nones(stat) for stat in remove_stats_nans(stats)]
        score = choose(mappings, ours.run, ours.model, ours.metric, ours.split)
        return score.value if (score.metric, score.split) == (ours.metric, ours.split) else None


class _RecordingExecutor(WholeRunExecutor):
    """Keeps a run's results, and the completions behind them: HELM's results have no token ids."""

    _state: ScenarioState
    _completions: dict[str, Completion]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Make every engine that is loaded meanwhile tell its completions, and close it in the end."""
        load = engines.load
        engines.close()  # one that is loaded already would not tell
        engines.load = lambda path, policy, window: _Recorded(load(path, policy, window), self)
        try:
            yield
        finally:
            engines.close()
            engines.load = load

    def execute(self, scenario_state: ScenarioState) -> ScenarioState:
        """Execute, and keep the outcome until `take`."""
        self._completions = {}
        self._state = super().execute(scenario_state)
        return self._state

    def note(self, job: Job, completion: Completion) -> None:
        """Keep a completion of the run being executed."""
        self._completions[_name(job)] = completion

    def take(self, run_spec: RunSpec) -> Answered:
        """Give what became of the run that was executed last."""
        client = self.client_of(self._state.request_states)
        assert client is not None, "run_all has looked at the deployments"
        return Answered(run_spec, self._state, client, self._completions, client.identity)


class _Recorded:
    """An engine that tells its completions to a recording executor."""

    def __init__(self, engine: RunningEngine, executor: _RecordingExecutor) -> None:
        self._engine = engine
        self._executor = executor
        self.observer: Callable[[SweepTiming], None] | None = None

    def sweeps(self, jobs: Sequence[Job]) -> Iterator[list[tuple[int, Completion]]]:
        """As the engine's."""
        asked = list(jobs)  # the caller lets go of its list
        for finished in self._engine.sweeps(asked):
            for index, completion in finished:
                self._executor.note(asked[index], completion)
            yield finished

    def weights_digest(self) -> str | None:
        """As the engine's."""
        return self._engine.weights_digest()

    def close(self) -> None:
        """As the engine's."""
        self._engine.close()


def _name(job: Job) -> str:
    """Tells jobs apart; they hold lists, so they cannot be keys themselves."""
    return repr(job)


def _served(run_spec: RunSpec) -> Served:
    """The model and policy of a run; `ConfigError` if it is not ours to run."""
    deployment = get_model_deployment(run_spec.adapter_spec.model_deployment)
    class_name = deployment.client_spec.class_name
    if not issubclass(get_class_by_name(class_name), FlexGenClient):
        raise ConfigError(
            f"verify is for runs of our engine, and {run_spec.name} is one of {class_name.rsplit('.', 1)[-1]}; "
            "leave model_deployment out of the run entry"
        )
    args = deployment.client_spec.args
    return engines.served(source_of(deployment), Policy.load(args.get("policy", "auto")), args.get("window"))
