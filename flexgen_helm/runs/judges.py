"""The judge of a command line: one of its models, or another one with its own policy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from helm.benchmark.model_deployment_registry import ModelDeployment, get_model_deployment
from helm.benchmark.run_spec import RunSpec

from engine.checkpoint.config import read_config
from engine.checkpoint.description import describe
from engine.errors import CapacityError, ConfigError, EngineError, named
from engine.job import Job
from engine.policy import Policy
from flexgen_helm.judging.judge import Judge
from flexgen_helm.judging.judged_runs import judged
from flexgen_helm.judging.kinds import needs_judge
from flexgen_helm.planning.forecast import forecast_of
from flexgen_helm.runs.flags import checked_policy
from flexgen_helm.runs.models import Models
from flexgen_helm.runs.registration import applies_chat_template, source_of
from flexgen_helm.workers.engine_processes import engine_processes

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bench:
    """A judge that is registered with HELM."""

    judge: Judge
    models: Models | None
    """Models to be written to HELM's files; None if the judge is one of the models that are judged."""


def find_judge(name: str, policy: str | None, models: Models, run_specs: Sequence[RunSpec]) -> Bench:
    """Register a judge with HELM, by its hub id or directory; `models` are all models of the run specs.

    Raises `ConfigError` for a model that was not trained to follow instructions, as far as its chat template shows, and
    for two models that HELM could not tell apart; `CapacityError` for one that does not fit this machine even alone,
    which would otherwise show only after the models have answered. Reads no weights.
    """
    is_one_of_them = name in models.names
    if is_one_of_them and policy is not None:
        raise ConfigError(
            f"--judge-policy {policy}: the judge {name} is the model that is judged, whose policy is --policy; "
            "leave --judge-policy out"
        )
    taken = {models.target(each).model_deployment for each in models.names}
    taken |= {run_spec.adapter_spec.model_deployment for run_spec in run_specs}
    own = models if is_one_of_them else Models(policy=checked_policy(policy) if policy else None)
    found = own.target(name)
    if not is_one_of_them and found.model_deployment in taken:
        raise ConfigError(
            f"the judge {name} and a model that it is to judge are both {found.model_deployment} for HELM; "
            "name it as --model or the run entry does where it is the same model, else rename its directory"
        )
    deployment = get_model_deployment(found.model_deployment)
    if not applies_chat_template(deployment, source_of(deployment)):
        raise ConfigError(
            f"the judge {source_of(deployment)} has no chat template, or is to run without it, so that it would "
            "continue instructions instead of following them; name a chat model"
        )
    for problem in own.problems():
        raise problem
    if not is_one_of_them:
        _check_room(deployment)
    judge = Judge(model=found.model, deployment=found.model_deployment)
    return Bench(judge=judge, models=None if is_one_of_them else own)


def _check_room(deployment: ModelDeployment) -> None:
    """Raise `CapacityError` if a judge has no memory for one request of one token.

    The bytes of a quantized model are known from its weight files, so one that is not downloaded yet is not checked.
    """
    source = source_of(deployment)
    description = describe(source, download_weights=False)
    has_weights = description.weight_bytes > 0
    if not has_weights and "quantization_config" in read_config(Path(description.path)):
        return
    policy = Policy.load(deployment.client_spec.args.get("policy", "auto"))
    smallest = [Job(prompt=(0,), max_new_tokens=1)]
    if engine_processes.cluster is not None:
        return  # the worker that opens it reports that
    look = engine_processes.resources
    try:
        forecast_of(description.path, description.dtype, policy, smallest, look=look, has_weights=has_weights)
    except CapacityError as error:
        raise CapacityError(f"the judge {source} does not fit under its policy: {error}") from None
    except EngineError:
        raise
    except Exception as error:  # an estimate must not end the command: opening the judge reports what is wrong
        _LOG.warning("whether the judge %s has room was not found out: %s", source, named(error))


def judged_by(judge: Judge, run_specs: list[RunSpec]) -> tuple[list[RunSpec], list[str]]:
    """Return the run specs as judged by the judge, and lines for the user to read at the end."""
    notes = (
        [] if any(map(needs_judge, run_specs)) else [f"no run is judged by a model: --judge {judge.model} did nothing"]
    )
    return [judged(run_spec, judge) for run_spec in run_specs], notes
