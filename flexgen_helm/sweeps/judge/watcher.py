"""Reports the progress of the judge's part of a suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from helm.benchmark.run_spec import RunSpec

from engine.job import Job
from flexgen_helm.helm.requests.asked import Answer
from flexgen_helm.sweeps.diary import SweepDiary
from flexgen_helm.sweeps.model_sweep import ModelSweep, PendingRun
from flexgen_helm.sweeps.parts import Watcher


class JudgeWatcher:
    """The `Watcher` of the judge's flow; it passes errors on to the suite's watcher."""

    def __init__(self, suite: Watcher, diary: SweepDiary, judged: Callable[[str], None]) -> None:
        """`judged` is called with the name of each run that is judged and written."""
        self._suite = suite
        self._diary = diary
        self._judged = judged

    def preparing(self, run_spec: RunSpec) -> None:
        """The requests to a run's judge are about to be made."""
        self._diary.judging(run_spec)

    def prepared(self, run: PendingRun) -> None:
        """The requests to a run's judge are made."""
        self._diary.counted(run)

    def foresee(self, model: ModelSweep, jobs: Sequence[Job]) -> Callable[[], None]:
        """Predict all requests to the judge."""
        return self._suite.foresee(model, jobs)

    def begin(self, model: ModelSweep) -> None:
        """The judge's engine is about to get its first requests."""
        self._suite.begin(model)

    def answered(self, model: ModelSweep, answer: Answer) -> None:
        """The judge has answered."""
        self._diary.answered(model, answer)

    def ended(self, run: PendingRun) -> None:
        """A run is judged and written."""
        self._judged(run.name)

    def failed(self, name: str, error: Exception) -> None:
        """A run could not be judged."""
        self._suite.failed(name, error)

    def fault(self, error: Exception) -> None:
        """The judge's engine, or its cache, has failed."""
        self._suite.fault(error)

    def end(self, model: ModelSweep) -> None:
        """All runs are judged."""
        self._diary.end(model)
