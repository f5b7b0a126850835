"""Compares a finished run's settings with the requested ones: HELM's run name contains only some of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from helm.benchmark.model_deployment_registry import get_model_deployment
from helm.benchmark.run_spec import RunSpec

from engine.errors import ConfigError, shown
from engine.policy import Policy
from engine.reading import find_file, read_json_object
from flexgen_helm.helm.dataclass_json import dumps
from flexgen_helm.helm.records.provenance import FILE_NAME, plain, read_provenance

_OF_RESULTS = ("dtype", "compress-weight", "compress-cache", "batch-invariant")
"""Keys of a policy that change results; all others only determine placement."""


def other_settings(folder: Path, run_spec: RunSpec, judge: str | None = None) -> str:
    """Return how the settings of the run in `folder` differ from those requested now; empty if they do not.

    `judge` is the deployment that is to judge, if there is one. For a run without a record of ours, as plain `helm-run`
    writes, only its run spec is compared. Raises `ConfigError` for invalid files.
    """
    earlier = read_json_object(folder / "run_spec.json", ConfigError)
    told = list(_differences(_flat(earlier), _flat(json.loads(dumps(run_spec)))))
    if find_file(folder / FILE_NAME, ConfigError):
        found = read_provenance(folder)
        asked = plain(get_model_deployment(run_spec.adapter_spec.model_deployment or ""))
        told += _differences(_deployment(found.entries.get("deployment"), found.policy), _deployment(asked))
        if judge is not None and found.judge:
            asked, policy = plain(get_model_deployment(judge)), found.judge.get("policy")
            then, now = _policy(policy), _policy(_args(asked)["policy"])
            if "entry" in found.judge:  # older records have only its policy
                then, now = _deployment(found.judge["entry"], policy), _deployment(asked)
            told += (f"{each} of the judge" for each in _differences(then, now))
    return ", ".join(told)


def _flat(run_spec: Mapping[str, Any]) -> dict[str, Any]:
    """A run spec as JSON, with the fields of its adapter among its own."""
    adapter = run_spec.get("adapter_spec")
    return {**run_spec, **(adapter if isinstance(adapter, Mapping) else {}), "adapter_spec": None}


def _deployment(entry: Any, policy: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All settings of a deployment that change results, under the given policy, or else its own."""
    args = _args(entry)
    own = args.pop("policy", None)
    fields = {name: value for name, value in entry.items() if name != "client_spec"}
    found: dict[str, Any] = json.loads(json.dumps({**fields, **args}, default=str))
    return {**found, **_policy(own if policy is None else policy)}


def _args(entry: Any) -> dict[str, Any]:
    try:
        return {"policy": None, **(entry["client_spec"].get("args") or {})}
    except (AttributeError, KeyError, TypeError):
        raise ConfigError("the record does not say how HELM knew the model") from None


def _policy(policy: Any) -> dict[str, Any]:
    loaded = Policy.load("auto" if policy is None else policy)
    found = replace(loaded, compress_weight=loaded.weight_bits).as_mapping()  # compared as rounded
    return {name: found.get(name) for name in _OF_RESULTS}


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys([*then, *now]):
        if then.get(name) != now.get(name):
            is_short = not isinstance(then.get(name, now.get(name)), dict | list)
            yield f"{name} ({_told(then, name)} then, {_told(now, name)} now)" if is_short else name


def _told(mapping: Mapping[str, Any], name: str) -> str:
    return shown(mapping[name]) if mapping.get(name) is not None else "unset"
