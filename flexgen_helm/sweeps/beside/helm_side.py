"""HELM's side of a suite's runs: making a run's requests, and writing its results, in this process or in a helper."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from helm.benchmark import model_deployment_registry, model_metadata_registry, tokenizer_config_registry
from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.executor import ExecutionSpec
from helm.benchmark.run import import_user_plugins, load_entry_point_plugins
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import get_benchmark_output_path, set_benchmark_output_path

from engine.errors import EngineError
from flexgen_helm.helm.engines import engines
from flexgen_helm.helm.preflight import find_problems
from flexgen_helm.helm.requests.entries import PackedEntries
from flexgen_helm.helm.requests.results import Response, failure, result
from flexgen_helm.helm.runner import WholeRunExecutor, settled
from flexgen_helm.helm.two_step_runner import Adapted, TwoStepRunner
from flexgen_helm.judging.kinds import needs_judge
from flexgen_helm.planning.environment import Environment, environment

PRELOADED = "flexgen_helm.sweeps.beside.preloaded"
"""The module that helper processes import before they are forked."""

Outcome = tuple[Response, bool] | EngineError
"""The result of a request: the cache's entry and whether it was there before, or the error."""
Identity = Mapping[str, str | int | None]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A run whose requests are made."""

    adapted: Any
    """The adapted run, for `finish` only."""
    total: int
    """Requests."""
    entries: PackedEntries
    """The entries of its requests."""


class HelmSide:
    """Makes and finishes runs in this process."""

    def __init__(self, runner: TwoStepRunner) -> None:
        """Call all methods in the main thread: some of HELM's metrics use signals."""
        self._runner = runner

    def problems(self, run_specs: Sequence[RunSpec]) -> dict[str, EngineError]:
        """See `find_problems`."""
        return find_problems(run_specs)

    def make(self, run_spec: RunSpec) -> Made:
        """Make a run's requests; raises what the scenario raises."""
        runner = self._runner
        try:
            adapted = runner.adapt(run_spec)
            states = adapted.state.request_states
            assert isinstance(runner.executor, WholeRunExecutor)
            entries = PackedEntries.of([])
            if states:
                client = runner.executor.client_of(states)
                if client is None:
                    raise EngineError(f"{run_spec.name} asks several model deployments; flexgen-helm run may run it")
                requests = [state.request for state in states]
                entries = client.pack(requests, runner.known_tokens)
                prompts = [request.prompt for request in requests]
                adapted.num_tokens = runner.known_tokens.numbers(client.tokenizer_name, prompts)
        finally:
            runner.known_tokens.forget()
        return Made(adapted=adapted, total=len(states), entries=entries)

    def finish(self, adapted: Adapted, outcomes: Sequence[Outcome], identity: Identity | None) -> None:
        """Annotate, compute metrics and write all files of a run of our client; hold a run that a model is to judge.

        Raises `NoRoom` when its directory cannot be written, `EngineElsewhere` when an engine was needed that another
        process has, and what annotators and metrics raise.
        """
        runner, state = self._runner, adapted.state
        states = state.request_states
        results = [
            failure(each.request, outcome)
            if isinstance(outcome, EngineError)
            else result(outcome[0], cached=outcome[1])
            for each, outcome in zip(states, outcomes, strict=True)
        ]
        assert isinstance(runner.executor, WholeRunExecutor)
        client = runner.executor.client_of(states)
        try:
            if client is not None:
                runner.known_tokens.count(client.tokenizer_name, adapted.num_tokens)
                if engines.guard.is_closed and identity is not None:
                    client.known_identity = dict(identity)
            write(runner, adapted, ScenarioState(state.adapter_spec, settled(states, results), state.annotator_specs))
        except Exception:  # it may wrap the exception that an engine was needed
            engines.guard.check_not_asked()
            raise
        finally:
            runner.known_tokens.forget()


def write(runner: TwoStepRunner, made: Adapted, state: ScenarioState) -> None:
    """Finish a run whose results are in `state`, or hold it where a model is to judge it; as `TwoStepRunner` does."""
    if needs_judge(made.run_spec):
        runner.hold(made, state)
    else:
        runner.finish(made, state)


class HelmSideThere(HelmSide):
    """Like `HelmSide`, in a helper process; data that the command's process stores for it are packed into few bytes."""

    def make(self, run_spec: RunSpec) -> Made:
        """Like `HelmSide.make`, with `Made.adapted` packed."""
        made = super().make(run_spec)
        return Made(adapted=pack(made.adapted), total=made.total, entries=made.entries)

    def finish(self, adapted: bytes, outcomes: Sequence[Outcome], identity: Identity | None) -> None:  # type: ignore[override]
        """Like `HelmSide.finish`."""
        super().finish(unpack(adapted), outcomes, identity)


def pack(adapted: Adapted) -> bytes:
    """A run as bytes: prompts have much in common."""
    return zlib.compress(pickle.dumps(adapted, pickle.HIGHEST_PROTOCOL), 1)


def unpack(packed: bytes | Adapted) -> Adapted:
    """A run of `pack`, or one that was not packed."""
    if isinstance(packed, Adapted):
        return packed
    found: Adapted = pickle.loads(zlib.decompress(packed))
    return found


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a process needs to make and finish runs as this one would; it is pickled."""

    execution_spec: ExecutionSpec
    output_path: str
    suite: str
    plugins: tuple[str, ...]
    moment: datetime
    """The current time as chat templates see it."""
    environment: Environment = field(default_factory=environment)
    helms_output_path: str = field(default_factory=get_benchmark_output_path)
    registries: dict[str, Any] = field(default_factory=lambda: {name: each() for name, each in _REGISTRIES.items()})
    """Everything that is registered with HELM in this process."""

    def open(self) -> HelmSideThere:
        """Make this process like the one that made the setting; what an engine would have to do is left to that one."""
        engines.guard.is_closed = True
        load_entry_point_plugins()
        import_user_plugins(self.plugins)
        for name, each in _REGISTRIES.items():
            _take_over(each(), self.registries[name])
        set_benchmark_output_path(self.helms_output_path)
        runner = TwoStepRunner(
            self.execution_spec, self.output_path, self.suite, skip_completed_runs=False, exit_on_error=False
        )
        runner.beginning.moment = self.moment
        runner.environment = lambda: self.environment
        return HelmSideThere(runner)


_REGISTRIES: dict[str, Callable[[], Any]] = {
    "deployments": lambda: model_deployment_registry.ALL_MODEL_DEPLOYMENTS,
    "deployments by name": lambda: model_deployment_registry.DEPLOYMENT_NAME_TO_MODEL_DEPLOYMENT,
    "models": lambda: model_metadata_registry.ALL_MODELS_METADATA,
    "models by name": lambda: model_metadata_registry.MODEL_NAME_TO_MODEL_METADATA,
    "tokenizers": lambda: tokenizer_config_registry.ALL_TOKENIZER_CONFIGS,
    "tokenizers by name": lambda: tokenizer_config_registry.TOKENIZER_NAME_TO_CONFIG,
}


def _take_over(own: Any, given: Any) -> None:
    own.clear()
    own.extend(given) if isinstance(own, list) else own.update(given)
