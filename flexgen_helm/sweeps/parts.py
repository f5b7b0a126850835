"""Who does what in a flow: those that make and finish runs, and those that are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from helm.benchmark.run_spec import RunSpec

from engine.job import Job
from flexgen_helm.helm.requests.asked import Answer
from flexgen_helm.sweeps.beside.helm_side import Identity, Made, Outcome
from flexgen_helm.sweeps.model_sweep import ModelSweep, PendingRun


class Helpers(Protocol):
    """Who does tasks: `HelperProcesses`, or `Here`."""

    @property
    def num_free(self) -> int:
        """Tasks that can be started now."""

    def start(self, method: str, *args: Any, then: Callable[[Any], None]) -> None:
        """Have a method of `HelmSide` called."""


class RunSide(Protocol):
    """Makes and finishes runs: `HelmSide`, or `JudgeSide`."""

    def make(self, run_spec: RunSpec) -> Made:
        """Make a run's requests."""

    def finish(self, adapted: Any, outcomes: Sequence[Outcome], identity: Identity | None) -> None:
        """Write a run whose requests are answered."""


class Watcher(Protocol):
    """Is told what happens, in the thread that runs the flow."""

    def preparing(self, run_spec: RunSpec) -> None:
        """A run's requests are about to be made."""

    def prepared(self, run: PendingRun) -> None:
        """A run's requests are made."""

    def foresee(self, model: ModelSweep, jobs: Sequence[Job]) -> Callable[[], None]:
        """What all requests of a model take; asked in another thread, and told by calling it in the flow's."""

    def begin(self, model: ModelSweep) -> None:
        """A model is about to be asked."""

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
