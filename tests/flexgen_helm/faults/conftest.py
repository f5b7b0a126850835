"""Undisturbed commands, beside which the disturbed ones are held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import Complete, Sweep

FLAGS = ("--percent", "50", "0", "0", "100", "100", "0", "--offload-dir", "offload", "--compress-weight")
"""Weights on the disk, too, and encoded ones that are kept."""


@pytest.fixture(scope="package")
def undisturbed_sweep(
    tiny_llama: Path, helm_data: Path, tmp_path_factory: pytest.TempPathFactory, warm_for_package: None
) -> Sweep:
    """A sweep that has run to its end."""
    sweep = Sweep(tmp_path_factory.mktemp("undisturbed") / "here", helm_data, tiny_llama, *FLAGS)
    ended = sweep.run()
    ended.check_clean(0)
    return sweep


@pytest.fixture(scope="package")
def undisturbed_complete(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, warm_for_package: None
) -> Complete:
    """The same of `complete`."""
    complete = Complete(tmp_path_factory.mktemp("undisturbed") / "here", tiny_llama, *FLAGS)
    complete.run().check_clean(0)
    return complete


@pytest.fixture(scope="package")
def warm_for_package(warm: object) -> Iterator[None]:
    """Commands are forks that have imported everything."""
    with warm.in_use():  # type: ignore[attr-defined]
        yield


@pytest.fixture
def make_sweep(tiny_llama: Path, helm_data: Path, tmp_path: Path, warm_for_package: None) -> Callable[..., Sweep]:
    """Make sweeps like the undisturbed one, each in a directory of its own."""
    return lambda name="here", **more: Sweep(tmp_path / name, helm_data, tiny_llama, *FLAGS, **more)


@pytest.fixture
def make_complete(tiny_llama: Path, tmp_path: Path, warm_for_package: None) -> Callable[..., Complete]:
    """The same of `complete`."""
    return lambda name="here", **more: Complete(tmp_path / name, tiny_llama, *FLAGS, **more)
