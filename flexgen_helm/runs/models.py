"""The models named on a command line: found among those that HELM knows, or made from their files, and registered."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from helm.benchmark.model_deployment_registry import ALL_MODEL_DEPLOYMENTS, ClientSpec, ModelDeployment
from helm.benchmark.model_metadata_registry import get_model_metadata
from helm.benchmark.tokenizer_config_registry import (
    TOKENIZER_NAME_TO_CONFIG,
    TokenizerSpec,
    get_tokenizer_config,
    register_tokenizer_config,
)

from engine.checkpoint.description import ModelDescription, describe, with_window
from engine.errors import ConfigError, EngineError, shown
from engine.policy import Policy
from flexgen_helm.helm.requests.shaping import Shaping
from flexgen_helm.runs.entries import Target
from flexgen_helm.runs.flags import PolicySpec
from flexgen_helm.runs.registration import (
    CLIENT,
    TOKENIZER,
    WITHOUT_CODE,
    Entries,
    entries_for,
    located_tokenizer,
    merge_into_local_path,
    register_in_process,
    source_of,
    with_longest_sequence,
)
from flexgen_helm.workers.engine_processes import engine_processes


class Models:
    """The models of one command line, each looked up once."""

    def __init__(
        self,
        *,
        policy: PolicySpec | None,
        path: str | None = None,
        max_sequence_length: int | None = None,
        **shaping: Any,
    ) -> None:
        """`policy` None keeps a known deployment's own; `path` is the directory of the weights of --model.

        `shaping` are args of `Shaping` for the deployment.
        """
        self._policy = policy
        self._path = path
        self._shaping = Shaping.of(shaping).given()
        self._max_sequence_length = max_sequence_length
        self.notes: list[str] = []
        """Lines for the user to read at the end."""
        self._entries: dict[str, Entries] = {}
        self._problems: dict[str, EngineError] = {}
        self._checks: list[Callable[[], None]] = []
        """The checks in progress: each returns when a model has been accepted, or raises."""

    @property
    def names(self) -> Collection[str]:
        """The models that were looked up and can be run, by the names that were given."""
        return self._entries.keys()

    def target(self, model: str) -> Target:
        """Register a hub id, directory or HELM model name with HELM, and return its names.

        Raises `EngineError` for a model that cannot be run; reads no weights. The results of `problems` are not known
        yet.
        """
        if model in self._problems:  # hundreds of entries may name it
            raise self._problems[model].with_traceback(None)
        if model not in self._entries:
            try:
                entries = self._known(model) or self._new(model)
            except EngineError as error:
                self._problems[model] = error
                raise
            register_in_process(entries)
            if self._path:
                register_tokenizer_config(entries.tokenizer)  # the one of --path, not of the hub
            refuse_code_of_tokenizer(entries.tokenizer.name)
            self._entries[model] = entries
        entries = self._entries[model]
        return Target(model=entries.model.name, model_deployment=entries.deployment.name)

    def problems(self) -> Iterator[EngineError]:
        """Yield the errors of models that were built without weights; waits until all are checked."""
        while self._checks:
            try:
                self._checks.pop(0)()
            except EngineError as error:
                yield error

    def _check(self, description: ModelDescription, policy: Policy) -> None:
        self._checks.append(engine_processes.check(description, policy))

    def write(self, local_path: str, made: Callable[[Path], None] = lambda file: None) -> None:
        """Merge the models into HELM's files, the only ones that helm-summarize and helm-server read.

        `made` is called with each file that is created.
        """
        for entries in self._entries.values():
            merge_into_local_path(entries, local_path, made)

    def cache_names(self) -> set[str]:
        """HELM's names of the files in which it caches requests to these models, and their tokens."""
        return {
            name.split("/")[0]
            for each in self._entries.values()
            for name in (each.deployment.name, each.tokenizer.name)
        }

    def _known(self, model: str) -> Entries | None:
        """Use a deployment of ours that HELM knows by the model's HELM name, under the policy of this run."""
        deployment = None if self._path or Path(model).expanduser().exists() else our_deployment(model)
        if deployment is None:
            return None
        description = describe(source_of(deployment), download_weights=False)
        own = deployment.client_spec.args
        asked = {} if self._policy is None else {"policy": self._policy}
        args = {**own, **asked, **self._shaping}
        self._tell_kept(deployment, given={*asked, *self._shaping})
        client_spec = ClientSpec(class_name=deployment.client_spec.class_name, args=args)
        deployment = dataclasses.replace(deployment, client_spec=client_spec)
        is_shaped = any(own.get(name) != value for name, value in self._shaping.items())
        if self._max_sequence_length is not None or is_shaped:
            deployment = with_longest_sequence(deployment, source_of(deployment), self._max_sequence_length)
        args = deployment.client_spec.args
        self._check(with_window(description, args.get("window")), Policy.load(args.get("policy", "auto")))
        tokenizer = get_tokenizer_config(deployment.tokenizer_name or model)
        if tokenizer is None:
            raise ConfigError(
                f"deployment {deployment.name} names tokenizer {deployment.tokenizer_name}, unknown to HELM"
            )
        tokenizer = located_tokenizer(tokenizer, deployment)
        return Entries(model=get_model_metadata(model), tokenizer=tokenizer, deployment=deployment)

    def _tell_kept(self, deployment: ModelDeployment, given: Collection[str]) -> None:
        """Note which args a known deployment has that a new one would not have, except for those `given` now."""
        plain = {"pretrained_model_name_or_path": source_of(deployment), "policy": "auto"}
        args = deployment.client_spec.args
        others = {name: value for name, value in args.items() if name not in given and value != plain.get(name)}
        kept = [f"{name} {shown(value)}" for name, value in others.items()]
        if kept:
            self.notes.append(
                f"{deployment.name} has {', '.join(kept)} by its entry in model_deployments.yaml, which `register` or "
                "an earlier run has written; flags win over it"
            )

    def _new(self, model: str) -> Entries:
        entries = entries_for(
            self._path or model,
            name=model if self._path else None,
            policy=self._policy or "auto",
            max_sequence_length=self._max_sequence_length,
            check=self._check,
            **self._shaping,
        )
        other = None if self._path else our_deployment(entries.model.name)
        if other is not None and os.path.realpath(source_of(other)) != os.path.realpath(source_of(entries.deployment)):
            # HELM's cache of tokens uses the name as key.
            raise ConfigError(
                f"HELM already knows {entries.model.name}, as {source_of(other)}, which is not {model}; "
                "give this run another --local-path"
            )
        return entries


def our_deployment(model: str) -> ModelDeployment | None:
    """Return the deployment of ours that HELM would use for a model, if there is one."""
    ours = [
        deployment
        for deployment in ALL_MODEL_DEPLOYMENTS
        if deployment.model_name == model and deployment.client_spec.class_name == CLIENT
    ]
    return ours[-1] if ours else None


def refuse_code_of_tokenizer(name: str) -> None:
    """Make HELM load a tokenizer in this process without asking whether its directory's code may run."""
    known = TOKENIZER_NAME_TO_CONFIG[name]
    spec = known.tokenizer_spec
    if spec.class_name == TOKENIZER and "trust_remote_code" not in (spec.args or {}):
        args = {**(spec.args or {}), **WITHOUT_CODE}
        register_tokenizer_config(
            dataclasses.replace(known, tokenizer_spec=TokenizerSpec(class_name=spec.class_name, args=args))
        )
