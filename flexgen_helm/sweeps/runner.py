"""Runs a suite: requests are made ahead, answered model by model, and each run is written when it is complete."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from helm.benchmark.executor import ExecutionSpec, ExecutorError
from helm.benchmark.run_spec import RunSpec

from engine.errors import ConfigError, EngineError, named
from engine.job import Job
from flexgen_helm.helm.request_cache import CacheFull
from flexgen_helm.helm.requests.asked import Answer
from flexgen_helm.helm.runner import RunsFailed, WholeRunExecutor, failed_requests
from flexgen_helm.helm.two_step_runner import NoRoom, TwoStepRunner
from flexgen_helm.judging.judge import Judge
from flexgen_helm.judging.kinds import needs_judge
from flexgen_helm.sweeps.beside.helm_side import PRELOADED, HelmSide, Setting, write
from flexgen_helm.sweeps.diary import SweepDiary
from flexgen_helm.sweeps.flow import Flow
from flexgen_helm.sweeps.foreseen import foresee
from flexgen_helm.sweeps.judge.side import JudgeSide, annotating
from flexgen_helm.sweeps.judge.watcher import JudgeWatcher
from flexgen_helm.sweeps.model_sweep import ModelSweep, PendingRun
from flexgen_helm.workers.helper_processes import HelperProcesses, Here, num_helpers


class SweepRunner(TwoStepRunner):
    """Runs run specs as one job and reports events to a `SweepDiary`."""

    def __init__(
        self,
        execution_spec: ExecutionSpec,
        output_path: str,
        suite: str,
        diary: SweepDiary,
        plugins: Sequence[str] = (),
        judge: Judge | None = None,
        **flags: bool,
    ) -> None:
        """See `TwoStepRunner`; `diary` is called in the thread that calls `run_all`.

        `plugins` are those that the user has named: helper processes import them, too. Without a `judge`, runs that
        need a judge are held.
        """
        super().__init__(execution_spec, output_path, suite, **flags)
        self.diary = diary
        self._suite = suite
        self._plugins = tuple(plugins)
        self._judge = judge
        self.judge_deployment = None if judge is None else judge.deployment
        self._to_judge: dict[str, RunSpec] = {}
        """Runs that need a judge, by name; those that are held have an entry in `_held`."""
        self._held: dict[str, PendingRun] = {}
        self._failures: dict[str, Exception] = {}

    def run_all(self, run_specs: list[RunSpec]) -> None:
        """Run everything that can be run; raises `RunsFailed` at the end if something failed, requests included.

        Raises `NoRoom` at once if nothing can be written; with `exit_on_error`, the first error itself.
        """
        self.clear_scratch()
        assert isinstance(self.executor, WholeRunExecutor)
        self._to_judge = {run_spec.name: run_spec for run_spec in run_specs if needs_judge(run_spec)}
        try:
            ours: list[RunSpec] = []
            others: list[RunSpec] = []
            here, todo = HelmSide(self), self._not_done(run_specs)
            with self._helpers(len(todo), here) as helpers:
                for run_spec in self._able(todo, helpers):
                    (ours if self.executor.is_ours(_deployment(run_spec)) else others).append(run_spec)
                Flow(ours, self.executor.our_client, helpers, here, self).run()
            for run_spec in others:
                self._run_as_helm_does(run_spec)
            if self._judge is not None and self._held:
                self._have_judged(self._judge)
        finally:
            self.clear_scratch()
            self._completed.clear()
        if self._failures:
            raise RunsFailed(self._failures)

    def _have_judged(self, judge: Judge) -> None:
        """Judge all runs that are held, together."""
        assert isinstance(self.executor, WholeRunExecutor)
        client = self.executor.our_client(judge.deployment)
        side = JudgeSide(self, judge, client)

        def judged(name: str) -> None:
            self.diary.judged(self._held[name], side.verdicts[name])

        watcher = JudgeWatcher(self, self.diary, judged)
        held = [self._to_judge[name] for name in self._held]
        Flow(held, self.executor.our_client, Here(side), side, watcher, lambda run_spec: judge.deployment).run()

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

    def _not_done(self, run_specs: Sequence[RunSpec]) -> list[RunSpec]:
        """Run specs that are to be run."""
        todo = []
        for run_spec in run_specs:
            if self._is_done(run_spec):
                self.diary.skipped(run_spec)
            else:
                todo.append(run_spec)
        return todo

    def _able(self, todo: Sequence[RunSpec], helpers: HelperProcesses | Here) -> list[RunSpec]:
        """Return the run specs that can be run. Helpers import the metrics for that, so that this process need not."""
        told: Future[Any] = Future()
        helpers.start("problems", todo, then=told.set_result)
        problems = self._without_annotators(todo)
        if isinstance(outcome := told.result(), BaseException):
            raise outcome
        for name, error in {**problems, **outcome}.items():
            self.failed(name, error)
        return [run_spec for run_spec in todo if run_spec.name not in self._failures]

    def _without_annotators(self, run_specs: Sequence[RunSpec]) -> dict[str, EngineError]:
        """Why the annotators of runs cannot be created, by run; they are not needed without a judge."""
        problems: dict[str, EngineError] = {}
        for run_spec in run_specs:
            if self._judge is not None and run_spec.name in self._to_judge:
                try:
                    annotating(run_spec, self._judge, self)
                except Exception as error:  # they download data, and import what they need
                    problems[run_spec.name] = ConfigError(f"{run_spec.name}: it cannot be judged: {named(error)}")
        return problems

    def _run_as_helm_does(self, run_spec: RunSpec) -> None:
        """Execute a run of another client, request by request."""
        self.diary.preparing(run_spec)
        try:
            adapted = self.adapt(run_spec)
            self.known_tokens.forget()
            run = PendingRun(run_spec.name, None, 0, len(adapted.state.request_states), 0)
            self.diary.prepared(run)
            write(self, adapted, self.executor.execute(adapted.state))
        except NoRoom:
            raise
        except Exception as error:
            self.failed(run_spec.name, error)
        else:
            self.ended(run)
        self.known_tokens.forget()

    # Events of the flow

    def preparing(self, run_spec: RunSpec) -> None:
        """A run's requests are about to be made."""
        self.diary.preparing(run_spec)

    def prepared(self, run: PendingRun) -> None:
        """A run's requests are made."""
        self.diary.prepared(run)

    def foresee(self, model: ModelSweep, jobs: Sequence[Job]) -> Callable[[], None]:
        """Predict all requests of a model; the result reports it when it is called."""
        return partial(self.diary.foretold, foresee(model, jobs))

    def begin(self, model: ModelSweep) -> None:
        """A model's engine is about to get its first requests."""
        if model.client.writes_date:
            self.beginning.keep()
        model.tally.restart()
        self.diary.begin(model)

    def answered(self, model: ModelSweep, answer: Answer) -> None:
        """The engine has answered."""
        self.diary.answered(model, answer)

    def ended(self, run: PendingRun) -> None:
        """A run is written, or held for its judge."""
        counts = run.counts
        if run.name in self._to_judge:
            self._held[run.name] = run
            self.diary.held(run, counts, is_to_be_judged=self._judge is not None)
        else:
            self.diary.done(run, counts)
        if counts.failed:
            self._failures[run.name] = ExecutorError(failed_requests(counts.failed))

    def failed(self, name: str, error: Exception) -> None:
        """Note that a run failed; the others continue, unless its error is to end all."""
        if isinstance(error, NoRoom):
            raise error
        self._failures[name] = error
        is_expected = isinstance(error, EngineError | ExecutorError)
        trace = "" if is_expected else "".join(traceback.format_exception(error))
        self.diary.failed(name, error, trace)
        if self.exit_on_error:
            raise error

    def fault(self, error: Exception) -> None:
        """Fail the rest of a model's runs after an error of the engine or cache, unless it is to end all."""
        if isinstance(error, NoRoom | CacheFull) or (self.exit_on_error and self._failures):
            raise error

    def end(self, model: ModelSweep) -> None:
        """All runs of a model have ended."""
        self.diary.end(model)


def _deployment(run_spec: RunSpec) -> str:
    return str(run_spec.adapter_spec.model_deployment)
