"""The entries of run_specs/ as the command line builds them, for a model that is registered but not there."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import tiktoken
from helm.benchmark import config_registry, runner
from helm.benchmark.run_spec import RunSpec
from tiny_models import ours, write_entries

import flexgen_helm.plugin  # noqa: F401 - registers our run entries
from engine.errors import ConfigError
from flexgen_helm.runs.entries import Target, assign_models, build_run_specs, check_run_spec_names, read_entries
from flexgen_helm.runs.flags import parse_run_flags

RUN_SPECS = Path(__file__).resolve().parents[2] / "run_specs"
FILES = tuple(sorted(path.stem for path in RUN_SPECS.glob("*.conf")))
DOWNLOADED_WHILE_PARSING = frozenset({"big_bench", "legalbench", "raft"})
NEEDS_XLRD = frozenset({"ice"})
"""Kinds of entries that HELM does not build without `crfm-helm[scenarios]`."""

NEEDS_DOCX = frozenset({"race_based_med"})
"""Likewise, without `crfm-helm[medhelm]`."""

Built = dict[str, list[RunSpec] | ConfigError]


def kind_of(entry: str) -> str:
    """The name of the entry's run spec function."""
    return entry.split(":")[0]


def register_model(folder: Path) -> None:
    """Make HELM know local/entries, as its own YAML files in `folder` would."""
    write_entries(folder, "local/entries", folder, ours=ours(folder))
    config_registry.register_configs_from_directory(str(folder))


@contextmanager
def what_entries_are_built_with() -> Iterator[None]:
    """Inside, HELM imports `docx` and loads a tokenizer of tiktoken's, of which making run specs uses nothing."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("docx") is None:
            docx = ModuleType("docx")
            docx.Document = None  # type: ignore[attr-defined]
            patch.setitem(sys.modules, "docx", docx)
        patch.setattr(tiktoken, "get_encoding", lambda name: None)
        yield


def build(arguments: list[str], output_path: Path) -> Built:
    """Build the entries of a command line: each entry's run specs, or the error; HELM's data is in `output_path`."""
    args = parse_run_flags([*arguments, "-m", "3"])
    entries = read_entries(args)
    check_run_spec_names(entries)
    target = Target(model="local/entries", model_deployment="ours/entries")
    before, built = runner._BENCHMARK_OUTPUT_PATH, Built()
    runner.set_benchmark_output_path(str(output_path))
    for entry in entries:
        assigned = assign_models([entry], ["local/entries"], lambda _: target, skip_others=False)
        try:
            with what_entries_are_built_with():
                built[entry.description] = build_run_specs(assigned, args)
        except ConfigError as error:
            built[entry.description] = error
    runner.set_benchmark_output_path(before)
    return built
