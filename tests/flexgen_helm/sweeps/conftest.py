"""The command line in a directory of its own that has HELM's data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flexgen_helm.run import main

Cli = Callable[..., int]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, helm_data: Path) -> Iterator[Cli]:
    """Run a command line in a directory that has HELM's data."""
    (tmp_path / "here/benchmark_output").mkdir(parents=True)
    (tmp_path / "here/benchmark_output/scenarios").symlink_to(helm_data / "scenarios")
    monkeypatch.chdir(tmp_path / "here")
    handler = logging.NullHandler()
    logging.getLogger("helm").addHandler(handler)
    yield lambda *arguments: main([str(argument) for argument in arguments])
    logging.getLogger("helm").removeHandler(handler)
