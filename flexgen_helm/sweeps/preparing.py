"""Makes and looks up all requests of a suite, before any is answered; what they will take then can be told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from helm.benchmark.run_spec import RunSpec

from engine.errors import EngineError
from engine.planning.hardware_profile import HardwareProfile
from flexgen_helm.helm.runner import WholeRunExecutor
from flexgen_helm.helm.two_step_runner import Adapted, TwoStepRunner
from flexgen_helm.planning.forecast import Forecast, duration, forecast_of, lines
from flexgen_helm.sweeps.model_sweep import ModelSweep, PendingRun


class Watcher(Protocol):
    """Is told how far it is."""

    def preparing(self, run_spec: RunSpec, number: int, total: int) -> None:
        """A run's requests are about to be made."""

    def prepared(self, run: PendingRun) -> None:
        """A run's requests are made."""


def prepare(
    runner: TwoStepRunner, run_specs: Sequence[RunSpec], watcher: Watcher, fail: Callable[[str, Exception], None]
) -> tuple[list[ModelSweep], list[Adapted]]:
    """Make all requests, in HELM's order, and look them up; returns our models, and what is for other clients.

    `fail` is called with the name and the error of each run whose requests cannot be made, or cannot be run.
    """
    ours: dict[str, ModelSweep] = {}
    others: list[Adapted] = []
    assert isinstance(runner.executor, WholeRunExecutor)
    for number, run_spec in enumerate(run_specs, start=1):
        watcher.preparing(run_spec, number, len(run_specs))
        try:
            adapted = runner.adapt(run_spec)
            client = runner.executor.client_of(adapted.state.request_states)
            if client is None:
                others.append(adapted)
                continue
            deployment = run_spec.adapter_spec.model_deployment
            model = ours.get(deployment) or ModelSweep(deployment, client)
            run = model.add(adapted)
            ours[deployment] = model
            watcher.prepared(run)
        except Exception as error:
            fail(run_spec.name, error)
    return list(ours.values()), others


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """What is left of a model's requests, and what it takes."""

    deployment: str
    todo: int
    """Requests to compute; equal ones count once."""
    cached: int
    """Requests that HELM's cache answers."""
    forecast: Forecast | None
    """None where nothing is left, or nothing can be said."""
    problem: str = ""
    """Why there is none."""


def foresee(model: ModelSweep, profile: HardwareProfile | None = None) -> Foreseen:
    """What a model's requests take, on this machine or that of `profile`; loads no weights."""
    jobs = [job for work in model.asked.todo.values() for job in work.jobs]
    found, problem = None, ""
    try:
        found = forecast_of(*model.client.source, model.client.policy, jobs, profile) if jobs else None
    except EngineError as error:
        problem = str(error)
    return Foreseen(
        deployment=model.deployment, todo=len(model.asked.todo), cached=model.cached, forecast=found, problem=problem
    )


def told(models: Sequence[Foreseen]) -> Iterator[str]:
    """Lines on each model, and on all together."""
    for model in models:
        yield f"{model.deployment}: {model.todo:,} requests to compute, {model.cached:,} answered by HELM's cache"
        if model.problem:
            yield f"  no forecast: {model.problem}"
        if model.forecast is not None:
            yield from (f"  {line}" for line in lines(model.forecast))
    known = [model.forecast for model in models if model.forecast is not None]
    seconds = [each.seconds for each in known if each.seconds is not None]
    if len(seconds) > 1:
        yield f"{len(seconds)} models, one after the other: {duration(sum(seconds))} at least"
