"""How many threads tests compute with, when garbage is collected, and processes that need not import torch anew."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
from warm_processes import WarmProcesses

# Tiny matrices are slower on several threads, and much slower where other processes take turns with them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Importing torch, HELM and all test modules makes nearly a million objects that stay: looking through them again and
# again for garbage takes a quarter of the time of collecting tests, and later a part of each test's.
gc.disable()

IMPORTS = """
from engine.engine import Engine
import helm.benchmark.metrics.basic_metrics
import helm.benchmark.metrics.common_metric_specs
import helm.clients.auto_client
from few_questions import SRNScenario, begin_with_few
SRNScenario.__init__ = begin_with_few
import flexgen_helm.sweeps.runner
from flexgen_helm.runs import launch
launch.register_builtin_configs_from_helm_package()  # takes longer than a sweep of ours; once is enough
launch.register_builtin_configs_from_helm_package = lambda: None
"""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Garbage is collected from now on, but none is looked for in what the test modules have imported."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmProcesses]:
    """What such processes are forked from; started by the first test that needs it."""
    with WarmProcesses(IMPORTS) as warm:
        yield warm


@pytest.fixture
def warm_processes(warm: WarmProcesses) -> Iterator[None]:
    """Processes of the test are such forks; see `warm_processes.py`."""
    with warm.in_use():
        yield
