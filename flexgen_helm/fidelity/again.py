"""Runs a finished run again from its record, in a separate directory, without using a request cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import cattrs
from helm.benchmark.annotation.annotator import Annotator
from helm.benchmark.augmentations.perturbation import Perturbation
from helm.benchmark.executor import ExecutionSpec
from helm.benchmark.metrics.metric import MetricInterface
from helm.benchmark.model_deployment_registry import ModelDeployment
from helm.benchmark.model_metadata_registry import ModelMetadata
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.scenarios.scenario import Scenario
from helm.benchmark.tokenizer_config_registry import TokenizerConfig, register_tokenizer_config
from helm.benchmark.window_services.window_service import WindowService
from helm.common.authentication import Authentication
from helm.common.codec import from_json
from helm.common.object_spec import ObjectSpec
from helm.tokenizers.tokenizer import Tokenizer

from engine.checkpoint.identity.result import differences, result_identity
from engine.errors import CheckpointError, ConfigError, EngineError
from engine.policy import Policy
from engine.reading import read_bytes
from flexgen_helm.helm.completed import MOST_BYTES, damaged_files
from flexgen_helm.helm.records.named_classes import named_class
from flexgen_helm.helm.records.provenance import Provenance
from flexgen_helm.helm.runner import RunsFailed
from flexgen_helm.judging.kinds import needs_judge
from flexgen_helm.runs.command_line_runner import CommandLineRunner
from flexgen_helm.runs.launch import register_what_is_installed
from flexgen_helm.runs.registration import (
    CLIENT,
    WITHOUT_CODE,
    Entries,
    located_tokenizer,
    register_in_process,
    source_of,
)
from flexgen_helm.runs.scratch_output import scratch_output
from flexgen_helm.terminal.errors import RunFailed
from flexgen_helm.terminal.progress import Progress

_SUITE = "again"
_OF_SOFTWARE = ("numerics", "source")
"""The parts of an identity that describe the software, not the checkpoint: a run may be repeated with other
software."""


@contextmanager
def run_again(run_path: Path, found: Provenance) -> Iterator[Path]:
    """Repeat a run, and yield the directory of its files, its record among them, which is removed afterwards.

    Raises `EngineError` for a run that cannot be repeated, before weights are loaded: files that HELM cannot read, a
    record without a model of ours, a checkpoint that has changed since. Raises `RunFailed` where the run fails now.
    """
    run_spec = _run_spec(run_path)
    entries = _entries(found)
    entries = replace(entries, tokenizer=located_tokenizer(entries.tokenizer, entries.deployment))
    output_path = run_path.parents[2] if run_path.parents[1].name == "runs" else run_path.parent
    with scratch_output(output_path) as scratch:
        local_path = scratch / "prod_env"
        register_what_is_installed()
        register_tokenizer_config(entries.tokenizer)
        register_in_process(entries)
        _check_checkpoint(found, entries)
        _run(run_spec, datetime.fromisoformat(found.began), scratch, local_path)
        yield scratch / "runs" / _SUITE / run_spec.name


def _run_spec(run_path: Path) -> RunSpec:
    if damaged := list(damaged_files(run_path)):
        raise ConfigError(f"{run_path} is no finished run: {', '.join(damaged)} cannot be read; run it again")
    run_spec: RunSpec = from_json(read_bytes(run_path / "run_spec.json", ConfigError, limit=MOST_BYTES), RunSpec)
    for spec, kind in _named_objects(run_spec):
        _check_class(spec.class_name, kind, str(run_path))
    if needs_judge(run_spec):
        raise ConfigError(
            f"{run_path} was judged by another model, whose verdicts are not reproduced; to compare answers, run the "
            "entry in a new suite without --judge, and compare the two scenario_state.json files"
        )
    return run_spec


def _named_objects(run_spec: RunSpec) -> Iterator[tuple[ObjectSpec, type[Any]]]:
    """All that HELM makes objects of when it runs the run, and what they are to be."""
    yield run_spec.scenario_spec, Scenario
    for spec in run_spec.metric_specs:
        yield spec, MetricInterface
    for annotator in run_spec.annotators or ():
        yield annotator, Annotator
    augmenter = run_spec.data_augmenter_spec
    for perturbation in augmenter.perturbation_specs if augmenter else ():
        yield perturbation, Perturbation


def _check_class(name: str, kind: type[Any], where: str) -> None:
    """Raise `ConfigError` for a class that the files of a run may not name."""
    try:
        named_class(name, kind)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}; run the entry itself again if you trust it") from None


def _entries(found: Provenance) -> Entries:
    """HELM's entries of the model, with the policy and dtype of the record."""
    try:
        deployment = found.entries["deployment"]
        if deployment["client_spec"]["class_name"] != CLIENT:
            raise ConfigError(f"the record names the client {deployment['client_spec']['class_name']}, not {CLIENT}")
        policy = {**found.policy, "dtype": found.identity["dtype"]}
        args = {**deployment["client_spec"]["args"], "policy": policy}
        spec = {**found.entries["tokenizer"]["tokenizer_spec"]}
        _check_class(spec["class_name"], Tokenizer, f"the record of {found.run}")
        if window := deployment.get("window_service_spec"):
            _check_class(window["class_name"], WindowService, f"the record of {found.run}")
        spec["args"] = {**(spec.get("args") or {}), **WITHOUT_CODE}
        tokenizer = _structured({**found.entries["tokenizer"], "tokenizer_spec": spec}, TokenizerConfig)
        deployment = {**deployment, "client_spec": {"class_name": CLIENT, "args": args}}
        Policy.from_mapping(policy, where="the record's policy")
        model = {"release_date": None, **found.entries["model"]}
        return Entries(
            model=_structured(model, ModelMetadata),
            tokenizer=tokenizer,
            deployment=_structured(deployment, ModelDeployment),
        )
    except EngineError:
        raise
    except Exception as error:  # the record may hold anything, and cattrs may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"the record of {found.run} does not say how HELM knew the model ({reason})") from None


def _structured(mapping: Mapping[str, Any], kind: type[Any]) -> Any:
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook(date, lambda text, _: date.fromisoformat(text))
    return converter.structure(mapping, kind)


def _check_checkpoint(found: Provenance, entries: Entries) -> None:
    """Raise `CheckpointError`, with both identities, if the checkpoint differs from the record's."""
    model = source_of(entries.deployment)
    policy = Policy.load(entries.deployment.client_spec.args["policy"])
    then, now = (
        {name: value for name, value in identity.items() if name not in _OF_SOFTWARE}
        for identity in (found.identity, result_identity(model, policy))
    )
    if not then.keys() >= {"weights", "files"}:
        raise ConfigError(f"the record of {found.run} does not say which checkpoint answered; run it again")
    if told := differences(then, now):
        raise CheckpointError(f"{model} has changed since the run was made: other {told}; restore the former files")


def _run(run_spec: RunSpec, began: datetime, scratch: Path, local_path: Path) -> None:
    display = CommandLineRunner.display = Progress(num_runs=1)
    runner = CommandLineRunner(
        ExecutionSpec(url=None, auth=Authentication(""), local_path=str(local_path), parallelism=1),
        output_path=str(scratch),
        suite=_SUITE,
        skip_instances=False,
        cache_instances=False,
        cache_instances_only=False,
        skip_completed_runs=False,
        exit_on_error=False,
    )
    runner.beginning.moment = began
    try:
        runner.run_all([run_spec])
    except RunsFailed as error:
        # Requests that fail now are a finding, if HELM has written the run nevertheless.
        if not (scratch / "runs" / _SUITE / run_spec.name / "stats.json").is_file():
            (reason,) = error.failures.values()
            told = str(reason) if isinstance(reason, EngineError) else f"{type(reason).__name__}: {reason}"
            raise RunFailed(f"{run_spec.name} cannot be run again: {' '.join(told.split())}") from error
    finally:
        display.close()
