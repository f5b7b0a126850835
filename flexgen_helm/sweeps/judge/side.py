"""The judge's part of a suite: makes the requests to the judge for held runs, and finishes these with its verdicts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.metrics.metric import MetricSpec
from helm.benchmark.model_deployment_registry import get_model_deployment
from helm.benchmark.run_spec import RunSpec
from helm.common.request import Request, RequestResult

from engine.errors import EngineError
from flexgen_helm.helm.client import FlexGenClient
from flexgen_helm.helm.records.provenance import plain
from flexgen_helm.helm.requests.results import failure, result
from flexgen_helm.helm.two_step_runner import Adapted, TwoStepRunner
from flexgen_helm.judging.annotating import Annotating, count, with_verdicts
from flexgen_helm.judging.judge import Judge
from flexgen_helm.judging.judge_client import key_of
from flexgen_helm.judging.judged_runs import unjudged_name
from flexgen_helm.judging.kinds import scores_verdicts
from flexgen_helm.judging.verdicts import Verdicts
from flexgen_helm.sweeps.beside.helm_side import Identity, Made, Outcome


@dataclass(eq=False)
class _ToJudge:
    """A run that is answered, and its requests to the judge."""

    held: Adapted
    annotating: Annotating
    requests: list[Request]
    refused: dict[str, RequestResult] = field(default_factory=dict)
    """Requests that cannot be run, by `key_of`, such as a prompt longer than the judge's window."""


class JudgeSide:
    """Like `HelmSide`, for the judge; all methods must be called in the main thread."""

    def __init__(self, runner: TwoStepRunner, judge: Judge, client: FlexGenClient) -> None:
        """`client` is the judge's."""
        self.verdicts: dict[str, Verdicts] = {}
        """The verdicts of each finished run, by its name."""
        self._runner = runner
        self._judge = judge
        self._client = client

    def make(self, run_spec: RunSpec) -> Made:
        """Read a run that is held, and find the requests of its annotators; raises what they raise before a request."""
        held, annotators = self._runner.held(run_spec), annotating(run_spec, self._judge, self._runner)
        found = _ToJudge(held, annotators, [])
        for request in annotators.requests(held.state.request_states):
            try:
                self._client.check([request])
            except EngineError as error:
                found.refused[key_of(request)] = failure(request, error)
            else:
                found.requests.append(request)
        try:
            entries = self._client.pack(found.requests, self._runner.known_tokens)
        finally:
            self._runner.known_tokens.forget()
        return Made(adapted=found, total=len(found.requests), entries=entries)

    def finish(self, adapted: _ToJudge, outcomes: Sequence[Outcome], identity: Identity | None) -> None:
        """Annotate, compute metrics and write all files of a run; raises what `TwoStepRunner.score` does."""
        answers = dict(adapted.refused)
        for request, outcome in zip(adapted.requests, outcomes, strict=True):
            answers[key_of(request)] = (
                failure(request, outcome) if isinstance(outcome, EngineError) else result(outcome[0], cached=outcome[1])
            )
        held, name = adapted.held, adapted.held.run_spec.name
        try:
            state = adapted.annotating.annotated(held.state, answers)
            self._runner.score(held, state, seen=_seen, judged=self._record(identity))
        finally:
            self._runner.known_tokens.forget()
        self.verdicts[name] = count(state.request_states)
        unjudged = Path(self._runner.runs_path) / unjudged_name(name, self._judge)
        if not (unjudged / "stats.json").exists():
            shutil.rmtree(unjudged, ignore_errors=True)  # the unjudged run of an earlier command

    def _record(self, identity: Identity | None) -> dict[str, Any]:
        return {
            "model": self._judge.model,
            "deployment": self._judge.deployment,
            "entry": plain(get_model_deployment(self._judge.deployment)),
            "policy": self._client.policy.as_mapping(),
            "identity": dict(identity or {}),
        }


def annotating(run_spec: RunSpec, judge: Judge, runner: TwoStepRunner) -> Annotating:
    """The annotators of a run; raises what they raise when they are created."""
    return Annotating(run_spec.annotators or (), judge, runner.annotator_executor.factory.get_annotator)


def _seen(metric: MetricSpec, state: ScenarioState) -> ScenarioState:
    return with_verdicts(state) if scores_verdicts(metric) else state
