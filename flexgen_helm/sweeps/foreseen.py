"""Estimates what the requests of a suite's models will take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.errors import EngineError, named
from engine.job import Job
from engine.planning.hardware_profile import HardwareProfile
from flexgen_helm.planning.forecast import Forecast, duration, forecast_of, lines
from flexgen_helm.sweeps.model_sweep import ModelSweep
from flexgen_helm.workers.engine_processes import engine_processes


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """The requests of a model that are left, and the estimate for them."""

    deployment: str
    todo: int
    """Requests to compute; equal ones count once."""
    cached: int
    """Requests that HELM's cache answers."""
    forecast: Forecast | None
    """The forecast; None where nothing is left, or none is possible."""
    problem: str = ""
    """Why there is no forecast."""


def foresee(model: ModelSweep, jobs: Sequence[Job], profile: HardwareProfile | None = None) -> Foreseen:
    """Estimate a model's requests `jobs`, on this machine or that of `profile`; loads no weights.

    For this machine, the engine's processes determine what may be used, so that this process touches no device.
    """
    found, problem = None, ""
    try:
        look = engine_processes.last_resources
        found = forecast_of(*model.client.source, model.client.policy, jobs, profile, look) if jobs else None
    except EngineError as error:
        problem = str(error)
    except Exception as error:  # the sweep runs without a forecast
        problem = named(error)
    return Foreseen(
        deployment=model.deployment, todo=model.num_todo, cached=model.cached, forecast=found, problem=problem
    )


def told(model: Foreseen) -> Iterator[str]:
    """Lines about a model."""
    yield f"{model.deployment}: {model.todo:,} requests to compute, {model.cached:,} answered by HELM's cache"
    if model.problem:
        yield f"  no forecast: {model.problem}"
    if model.forecast is not None:
        yield from (f"  {line}" for line in lines(model.forecast))


def told_together(models: Sequence[Foreseen]) -> Iterator[str]:
    """A line about all models together, if there are several."""
    known = [model.forecast for model in models if model.forecast is not None]
    seconds = [each.seconds for each in known if each.seconds is not None]
    if len(seconds) > 1:
        yield f"{len(seconds)} models, one after the other: {duration(sum(seconds))} at least"
