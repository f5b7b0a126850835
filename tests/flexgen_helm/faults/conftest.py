"""Results of undisturbed commands, which those of disturbed ones are compared with."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import Complete, Sweep
from warm_processes import WarmProcesses

IMPORTS = """
from engine.engine import Engine
import helm.benchmark.metrics.basic_metrics
import helm.benchmark.metrics.common_metric_specs
import helm.clients.auto_client
import flexgen_helm.sweeps.runner
from flexgen_helm.runs import launch
launch.register_builtin_configs_from_helm_package()  # takes longer than a sweep of ours; once is enough
launch.register_builtin_configs_from_helm_package = lambda: None
"""
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
def warm_for_package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands are forks that have imported everything, and whose reads and writes can be made to fail."""
    library = tmp_path_factory.mktemp("io") / "io_faults.so"
    compiler = shutil.which("cc") or shutil.which("gcc")
    with pytest.MonkeyPatch.context() as patch:
        if compiler is not None:
            source = Path(__file__).with_name("io_faults.c")
            subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
            patch.setenv("LD_PRELOAD", str(library))
        with WarmProcesses(IMPORTS) as warm, warm.in_use():
            patch.delenv("LD_PRELOAD", raising=False)
            yield


@pytest.fixture
def failing_io() -> None:
    """Skips a test where there is no compiler."""
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("no C compiler")


@pytest.fixture
def make_sweep(tiny_llama: Path, helm_data: Path, tmp_path: Path, undisturbed_sweep: Sweep) -> Callable[..., Sweep]:
    """Make sweeps like the undisturbed one, each in a directory of its own."""

    def make(name: str = "here") -> Sweep:
        sweep = Sweep(tmp_path / name, helm_data, tiny_llama, *FLAGS)
        sweep.take_compiled_of(undisturbed_sweep)
        return sweep

    return make


@pytest.fixture
def make_complete(tiny_llama: Path, tmp_path: Path, undisturbed_complete: Complete) -> Callable[..., Complete]:
    """The same of `complete`."""

    def make(name: str = "here") -> Complete:
        complete = Complete(tmp_path / name, tiny_llama, *FLAGS)
        complete.take_compiled_of(undisturbed_complete)
        return complete

    return make
