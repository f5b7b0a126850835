"""Runs a suite: requests are made ahead, answered model by model, and each run is written when it is whole."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from functools import partial

from helm.benchmark.executor import ExecutionSpec, ExecutorError
from helm.benchmark.run_spec import RunSpec

from engine.errors import EngineError
from engine.job import Job
from flexgen_helm.helm.preflight import find_problems
from flexgen_helm.helm.request_cache import CacheFull
from flexgen_helm.helm.requests.asked import Answer
from flexgen_helm.helm.runner import RunsFailed, WholeRunExecutor, failed_requests
from flexgen_helm.helm.two_step_runner import NoRoom, TwoStepRunner
from flexgen_helm.sweeps.beside.helm_side import PRELOADED, HelmSide, Setting
from flexgen_helm.sweeps.diary import SweepDiary
from flexgen_helm.sweeps.flow import Flow
from flexgen_helm.sweeps.foreseen import foresee
from flexgen_helm.sweeps.model_sweep import ModelSweep, PendingRun
from flexgen_helm.workers.helper_processes import HelperProcesses, Here, num_helpers


class SweepRunner(TwoStepRunner):
    """Runs run specs as one job and tells a `SweepDiary` what becomes of them."""

    def __init__(
        self,
        execution_spec: ExecutionSpec,
        output_path: str,
        suite: str,
        diary: SweepDiary,
        plugins: Sequence[str] = (),
        **flags: bool,
    ) -> None:
        """As `TwoStepRunner`; `diary` is told in the thread that calls `run_all`.

        `plugins` are those that the user has named: processes that help import them, too.
        """
        super().__init__(execution_spec, output_path, suite, **flags)
        self.diary = diary
        self._suite = suite
        self._plugins = tuple(plugins)
        self._failures: dict[str, Exception] = {}

    def run_all(self, run_specs: list[RunSpec]) -> None:
        """Run everything that can be run; raises `RunsFailed` at the end if something failed, requests included.

        Raises `NoRoom` at once where nothing can be written; with `exit_on_error`, the first error as it is.
        """
        self.clear_scratch()
        assert isinstance(self.executor, WholeRunExecutor)
        try:
            ours: list[RunSpec] = []
            others: list[RunSpec] = []
            for run_spec in self._left(run_specs):
                (ours if self.executor.is_ours(_deployment(run_spec)) else others).append(run_spec)
            here = HelmSide(self)
            with self._helpers(len(ours), here) as helpers:
                Flow(ours, self.executor.our_client, helpers, here, self).run()
            for run_spec in others:
                self._run_as_helm_does(run_spec)
        finally:
            self.clear_scratch()
        if self._failures:
            raise RunsFailed(self._failures)

    def _helpers(self, num_runs: int, here: HelmSide) -> HelperProcesses | Here:
        number = num_helpers(num_runs)
        if not number:
            return Here(here)
        setting = Setting(
            execution_spec=self.executor.execution_spec,
            output_path=self.output_path,
            suite=self._suite,
            plugins=self._plugins,
            moment=self.beginning.moment,
        )
        return HelperProcesses(number, PRELOADED, setting.open)

    def _left(self, run_specs: Sequence[RunSpec]) -> list[RunSpec]:
        """Run specs that are to be run and that can be."""
        todo = []
        for run_spec in run_specs:
            if self._is_done(run_spec):
                self.diary.skipped(run_spec)
            else:
                todo.append(run_spec)
        for name, error in find_problems(todo).items():
            self.failed(name, error)
        return [run_spec for run_spec in todo if run_spec.name not in self._failures]

    def _run_as_helm_does(self, run_spec: RunSpec) -> None:
        """Execute a run of another client, request by request."""
        self.diary.preparing(run_spec)
        try:
            adapted = self.adapt(run_spec)
            self.known_tokens.forget()
            run = PendingRun(run_spec.name, None, 0, len(adapted.state.request_states), 0)
            self.diary.prepared(run)
            self.finish(adapted, self.executor.execute(adapted.state))
        except NoRoom:
            raise
        except Exception as error:
            self.failed(run_spec.name, error)
        else:
            self.diary.done(run, failed=[])
        self.known_tokens.forget()

    # What the flow tells

    def preparing(self, run_spec: RunSpec) -> None:
        """A run's requests are about to be made."""
        self.diary.preparing(run_spec)

    def prepared(self, run: PendingRun) -> None:
        """A run's requests are made."""
        self.diary.prepared(run)

    def foresee(self, model: ModelSweep, jobs: Sequence[Job]) -> Callable[[], None]:
        """What all requests of a model will take; what is returned tells it."""
        return partial(self.diary.foretold, foresee(model, jobs))

    def begin(self, model: ModelSweep) -> None:
        """A model is about to be asked."""
        if model.client.writes_date:
            self.beginning.keep()
        model.tally.restart()
        self.diary.begin(model)

    def answered(self, model: ModelSweep, answer: Answer) -> None:
        """The engine has answered."""
        self.diary.answered(model, answer)

    def ended(self, run: PendingRun) -> None:
        """A run is written."""
        failed = run.failed
        self.diary.done(run, failed)
        if failed:
            self._failures[run.name] = ExecutorError(failed_requests(failed))

    def failed(self, name: str, error: Exception) -> None:
        """A run failed; the others go on, unless its error is to end all."""
        if isinstance(error, NoRoom):
            raise error
        self._failures[name] = error
        is_expected = isinstance(error, EngineError | ExecutorError)
        trace = "" if is_expected else "".join(traceback.format_exception(error))
        self.diary.failed(name, error, trace)
        if self.exit_on_error:
            raise error

    def fault(self, error: Exception) -> None:
        """A fault on the way to an answer fails the runs that are left of a model, unless it is to end all."""
        if isinstance(error, NoRoom | CacheFull) or (self.exit_on_error and self._failures):
            raise error

    def end(self, model: ModelSweep) -> None:
        """All runs of a model have ended."""
        self.diary.end(model)


def _deployment(run_spec: RunSpec) -> str:
    return str(run_spec.adapter_spec.model_deployment)
