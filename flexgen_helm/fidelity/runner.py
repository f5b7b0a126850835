"""The runner of `flexgen-helm verify`: it keeps the engine's answers and compares them with the reference."""

from __future__ import annotations

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

from engine.errors import CapacityError, ConfigError, EngineError, UnsupportedError
from engine.planning.hardware import resolve_device, resolve_dtype
from engine.policy import Policy
from flexgen_helm.fidelity.comparison import Comparison, compare
from flexgen_helm.fidelity.layers import Layers, compare_layers
from flexgen_helm.fidelity.oracle import Oracle
from flexgen_helm.fidelity.record import write_record
from flexgen_helm.fidelity.recording import Answered, RecordingExecutor
from flexgen_helm.fidelity.reference import Reference, find_place
from flexgen_helm.fidelity.verdict import Fidelity
from flexgen_helm.helm.client import FlexGenClient
from flexgen_helm.helm.engines import Served, engines
from flexgen_helm.helm.requests.translate import SEEDS
from flexgen_helm.helm.runner import RunsFailed
from flexgen_helm.helm.scores import Score, choose, read_scores, short_name
from flexgen_helm.judging.judged_runs import without_judge
from flexgen_helm.planning.environment import environment
from flexgen_helm.runs.command_line_runner import CommandLineRunner
from flexgen_helm.runs.registration import source_of
from flexgen_helm.terminal.progress import Progress, StatusLine


class VerifyingRunner(CommandLineRunner):
    """Runs all run specs and compares them with the reference, one loaded model at a time.

    The reference is the whole model in plain transformers where possible, loaded after our engine is closed. Otherwise,
    our engine computes stock layers next to its own, before it is closed.
    """

    found: ClassVar[list[Fidelity]] = []
    """The results; on the class, because HELM creates the runner from the class's name."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._recording = self.executor = RecordingExecutor(self.executor, self._report, self.tell)
        self._answered: list[Answered] = []
        self._by_layer: dict[str, str] = {}
        """Why a model is compared layer by layer, by model directory."""

    def run_all(self, run_specs: list[RunSpec]) -> None:
        """Run and compare; raises `EngineError` before anything runs if a run is not ours.

        Raises `RunsFailed` at the end if a run failed; the others are compared nevertheless. Verdicts of judges are
        left out, because they are answers of other models.
        """
        run_specs = [without_judge(run_spec) for run_spec in run_specs]
        for run_spec in run_specs:
            _refuse_forced_tokens(run_spec)
            self._choose(_served(run_spec))
        failed: RunsFailed | None = None
        with self._recording.listening():
            try:
                super().run_all(run_specs)
            except RunsFailed as error:
                failed = error
            self.display.close()
            self._compare(by_layer=True)
        self._compare(by_layer=False)
        if failed is not None:
            raise failed

    def run_one(self, run_spec: RunSpec) -> None:
        """Run one run spec and record its answers."""
        super().run_one(run_spec)
        self._answered.append(self._recording.take(run_spec))

    def _choose(self, served: Served) -> None:
        """Note the model if the reference cannot be the whole one."""
        path = served.description.path
        if path in self._by_layer:
            return
        try:
            find_place(served.description, served.policy)
        except (CapacityError, UnsupportedError) as error:
            if served.policy.stages > 1:
                raise UnsupportedError(
                    f"{path} can be compared layer by layer alone ({error}), which needs all layers in one process; "
                    "set stages: 1"
                ) from None
            self._by_layer[path] = str(error)
            self.tell(f"{path} will be compared layer by layer: {error}")

    def _compare(self, *, by_layer: bool) -> None:
        """Compare the runs of the models that are compared in this way."""
        asked = [
            answered
            for answered in self._answered
            if (_served(answered.run_spec).description.path in self._by_layer) == by_layer
        ]
        display = Progress(num_runs=len(asked))
        order = [answered.run_spec.name for answered in self._answered]
        by_model = sorted(asked, key=lambda answered: _served(answered.run_spec).description.path)
        try:
            for served, group in groupby(by_model, key=lambda answered: _served(answered.run_spec)):
                compare_model = self._compare_by_layer if by_layer else self._compare_whole
                compare_model(served, list(group), display)
        finally:
            display.close()
        self.found.sort(key=lambda each: order.index(each.score.run))

    def _compare_whole(self, served: Served, runs: list[Answered], display: Progress) -> None:
        try:
            place = find_place(served.description, served.policy)
        except EngineError as error:  # there is less memory than before the runs, so this is no bad input
            raise EngineError(str(error)) from error
        reference = Reference.load(served.description, place)
        for answered in runs:
            self._compare_run(served, answered, reference, place.dtype, place.device, None, display)

    def _compare_by_layer(self, served: Served, runs: list[Answered], display: Progress) -> None:
        path, policy = served.description.path, served.policy
        device = resolve_device(policy.device)
        dtype = resolve_dtype(policy.dtype, served.description.dtype, device)
        answers = [pair for answered in runs for pair in answered.answers()]
        if not answers:
            return  # every request failed, which the runs have reported
        status = StatusLine(None)

        def progress(done: int, total: int) -> None:
            if status.in_place:
                status.show(f"layer by layer: {done}/{total}")

        with served.running([job for job, _ in answers]) as engine:
            model = runs[0].run_spec.adapter_spec.model
            layers, reference = compare_layers(
                model, self._by_layer[path], dtype, answers, engine.compare_with_stock, progress
            )
        status.clear()
        for answered in runs:
            self._compare_run(served, answered, reference, dtype, device, layers, display)

    def _compare_run(
        self,
        served: Served,
        answered: Answered,
        reference: Oracle,
        dtype: str,
        device: str,
        layers: Layers | None,
        display: Progress,
    ) -> None:
        run_spec = answered.run_spec
        display.begin(f"reference {short_name(run_spec.name)}")
        translator = answered.client._translator
        comparison = compare(answered.state.request_states, answered.completion_of, translator, reference, display)
        (ours,) = read_scores([run_spec], Path(self.runs_path))
        found = Fidelity(
            comparison=comparison,
            score=ours,
            reference_score=self._score(answered, comparison, ours),
            dtype=dtype,
            layers=layers,
        )
        self.found.append(found)
        record = {
            "run": run_spec.name,
            "model": run_spec.adapter_spec.model,
            "weights": served.description.path,
            "policy": served.policy.as_mapping() or "auto",
            "identity": answered.identity,
            "dtype": dtype,
            "reference_device": device,
            "seeds": SEEDS,
            **environment().as_mapping(),
            **found.figures(),
        }
        write_record(Path(self._get_run_path(run_spec)), record)

    def _score(self, answered: Answered, comparison: Comparison, ours: Score) -> float | None:
        """The metric of our score, computed by HELM from the reference's results."""
        if comparison.num_untold or any(each.is_sampled for each in comparison.compared):
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


def _refuse_forced_tokens(run_spec: RunSpec) -> None:
    """Raise `UnsupportedError` for a deployment whose texts have tokens that its model did not choose."""
    deployment = get_model_deployment(str(run_spec.adapter_spec.model_deployment))
    if deployment.client_spec.args.get("thinking_budget") is not None:
        raise UnsupportedError(
            f"{run_spec.name}: verify compares what a model chooses, and thinking_budget of {deployment.name} makes it "
            "end its thinking; leave it out here"
        )


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
