"""HELM's tables of a suite, made by its own summarizer in this process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from helm.benchmark.config_registry import register_builtin_configs_from_helm_package
from helm.benchmark.presentation.summarize import Summarizer


@dataclass(frozen=True)
class Tables:
    """Those of one group of a schema; all runs are of one model."""

    cells: dict[str, float | None]
    """Of all tables, by the names of their columns; of equal names the first."""
    descriptions: dict[str, str]


def summarized(suite: Path, schema: str, group: str, kind: type[Summarizer] = Summarizer) -> Tables:
    """What `helm-summarize` shows of a suite by one of the schemas that HELM has."""
    path = str(files("helm.benchmark") / "static" / f"schema_{schema}.yaml")
    register_builtin_configs_from_helm_package()
    kind(
        release=None,
        suites=None,
        suite=suite.name,
        schema_path=path,
        output_path=str(suite.parent.parent),
        verbose=False,
        num_threads=1,
        allow_unknown_models=True,
    ).run_pipeline(skip_completed=False)
    cells, descriptions = dict[str, Any](), dict[str, str]()
    for table in json.loads((suite / "groups" / f"{group}.json").read_text()):
        (row,) = table["rows"]
        for head, cell in zip(table["header"], row, strict=True):
            cells.setdefault(head["value"], cell.get("value"))
            descriptions[head["value"]] = head.get("description", "")
    return Tables(cells, descriptions)
