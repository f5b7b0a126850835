"""The command line in an empty directory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flexgen_helm.run import main


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Run a command line in an empty directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    handler = logging.NullHandler()  # HELM's own would keep writing to this test's stdout
    logging.getLogger("helm").addHandler(handler)
    yield lambda *arguments: main([str(argument) for argument in arguments])
    logging.getLogger("helm").removeHandler(handler)
