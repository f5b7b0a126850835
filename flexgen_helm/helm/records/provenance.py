"""The provenance of a run: the record next to its files from which it can be repeated and compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Any

from helm.benchmark.model_deployment_registry import ModelDeployment, get_model_deployment
from helm.benchmark.model_metadata_registry import get_model_metadata
from helm.benchmark.tokenizer_config_registry import get_tokenizer_config

from engine.errors import ConfigError, one_line
from engine.memory.replaced import replace_text
from engine.reading import find_file, open_file
from flexgen_helm.helm.client import FlexGenClient
from flexgen_helm.helm.requests.translate import SEEDS
from flexgen_helm.planning.environment import Environment, Hardware
from flexgen_helm.planning.stored import SINCE, read_versioned

FILE_NAME = "flexgen_run.json"
VERSION = 1
SEALED = ("run_spec.json", "scenario_state.json", "stats.json")
"""The files of a run that its record is valid for."""
_CURE = "run it again with `flexgen-helm run` or `sweep`, which write its record"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Everything that is needed to repeat a run, and to report what has changed since."""

    version: int = VERSION
    run: str
    """HELM's name of the run spec, which is also its directory's."""
    written: str
    """ISO 8601, with the zone."""
    began: str
    """The time that chat templates saw: ISO 8601, local time."""
    versions: Mapping[str, str]
    commit: str | None
    hardware: Hardware
    policy: Mapping[str, Any]
    """The policy as given, without defaults: empty for `auto`."""
    identity: Mapping[str, Any]
    """Everything of the model and policy that can change a result, as in HELM's cache keys."""
    chat_template: bool
    """Whether prompts that are answered, not only scored, went through the tokenizer's chat template."""
    seeds: str
    """How the seeds of sampled completions are derived from requests."""
    entries: Mapping[str, Any]
    """HELM's "model", "tokenizer" and "deployment", as in its YAML files."""
    files: Mapping[str, str]
    """Hex digests (SHA-256) of the run's `SEALED` files."""
    judge: Mapping[str, Any] = field(default_factory=dict, metadata=SINCE)
    """For a run that another model has judged: its "model", "deployment", "policy" and "identity"."""


def provenance_of(
    name: str, deployment: str, client: FlexGenClient, began: datetime, folder: Path, found: Environment
) -> Provenance:
    """The provenance of a run of our client with its files in `folder`; raises `OSError` where they cannot be read."""
    return Provenance(
        run=name,
        written=datetime.now().astimezone().isoformat(timespec="seconds"),
        began=began.isoformat(),
        versions=found.versions,
        commit=found.commit,
        hardware=found.hardware,
        policy=client.policy.as_mapping(),
        identity=client.identity,
        chat_template=client.applies_chat_template,
        seeds=SEEDS,
        entries=_entries(get_model_deployment(deployment)),
        files={each: _digest(folder / each) for each in SEALED},
    )


def write_provenance(folder: Path, found: Provenance) -> None:
    """Write `flexgen_run.json` into `folder`, atomically; raises `OSError`."""
    replace_text(folder / FILE_NAME, json.dumps(asdict(found), indent=1, default=str) + "\n")


def read_provenance(folder: Path) -> Provenance:
    """Read the record of the run in a directory.

    Raises `ConfigError` if there is none, if it is another version's, or if the run's files have changed since it was
    written.
    """
    path = folder / FILE_NAME
    if not find_file(path, ConfigError):
        raise ConfigError(
            f"{folder} has no {FILE_NAME}: plain helm-run or an earlier flexgen-helm wrote the run; {_CURE}"
        )
    found = read_versioned(path, Provenance, VERSION, what="record of a run", cure=_CURE)
    for name in SEALED:
        try:
            digest = _digest(folder / name)
        except OSError as error:
            raise ConfigError(f"{one_line(error)}; {_CURE}") from None
        if digest != found.files.get(name):
            raise ConfigError(f"{folder / name} has changed since {FILE_NAME} was written next to it; {_CURE}")
    return found


def _entries(deployment: ModelDeployment) -> dict[str, Any]:
    model = get_model_metadata(deployment.model_name or deployment.name)
    tokenizer = get_tokenizer_config(deployment.tokenizer_name or model.name)
    return {"model": plain(model), "tokenizer": plain(tokenizer), "deployment": plain(deployment)}


def plain(entry: Any) -> dict[str, Any]:
    """A dataclass of HELM's as in its YAML, without unset fields, and with dates as text."""
    mapping = {} if entry is None else dataclasses.asdict(entry)
    mapping.pop("deployment_names", None)  # those of this process
    return {
        name: value.isoformat() if isinstance(value, date) else value
        for name, value in mapping.items()
        if value is not None
    }


def _digest(file: Path) -> str:
    """Compute a file's digest; raises `OSError`, which names the file, if it is no regular file or cannot be read."""
    digest = hashlib.sha256()
    with open_file(file, OSError) as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
