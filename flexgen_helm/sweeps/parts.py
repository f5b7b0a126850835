"""The interfaces of a flow's parts: those that make and finish runs, and those that watch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from helm.benchmark.run_spec import RunSpec

from engine.job import Job
from flexgen_helm.helm.requests.asked import Answer
from flexgen_helm.sweeps.beside.helm_side import Identity, Made, Outcome
from flexgen_helm.sweeps.model_sweep import ModelSweep, PendingRun


class Helpers(Protocol):
    """Executes tasks: `HelperProcesses`, or `Here`."""

    @property
    def num_free(self) -> int:
        """Tasks that can be started now."""

    def start(self, method: str, *args: Any, then: Callable[[Any], None]) -> None:
        """Call a method of `HelmSide`."""


class RunSide(Protocol):
    """Makes and finishes runs: `HelmSide`, or `JudgeSide`."""

    def make(self, run_spec: RunSpec) -> Made:
        """Make a run's requests."""

    def finish(self, adapted: Any, outcomes: Sequence[Outcome], identity: Identity | None) -> None:
        """Write a run whose requests are answered."""


class Watcher(Protocol):
    """Is informed of events, in the thread that runs the flow."""

    def preparing(self, run_spec: RunSpec) -> None:
        """A run's requests are about to be made."""

    def prepared(self, run: PendingRun) -> None:
        """A run's requests are made."""

    def foresee(self, model: ModelSweep, jobs: Sequence[Job]) -> Callable[[], None]:
        """Predict all requests of a model: called in another thread; its result is called in the flow's thread."""

    def begin(self, model: ModelSweep) -> None:
        """A model's engine is about to get its first requests."""

    def answered(self, model: ModelSweep, answer: Answer) -> None:
        """The engine has answered."""

    def ended(self, run: PendingRun) -> None:
        """A run is written."""

    def failed(self, name: str, error: Exception) -> None:
        """A run failed; may raise, which ends the flow."""

    def fault(self, error: Exception) -> None:
        """The engine, or its cache, has failed; may raise, which ends the flow."""

    def end(self, model: ModelSweep) -> None:
        """All runs of a model have ended."""
