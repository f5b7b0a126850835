"""Runs a suite: all requests are made first, then answered model by model, and each run is written when it is whole."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from sys import getswitchinterval, setswitchinterval

from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.executor import ExecutionSpec, ExecutorError
from helm.benchmark.run_spec import RunSpec

from engine.errors import EngineError
from flexgen_helm.helm.preflight import find_unusable_metrics
from flexgen_helm.helm.request_cache import CacheFull
from flexgen_helm.helm.requests.asked import Answer
from flexgen_helm.helm.runner import RunsFailed, failed_requests, settled
from flexgen_helm.helm.two_step_runner import Adapted, NoRoom, TwoStepRunner
from flexgen_helm.sweeps.diary import SweepDiary
from flexgen_helm.sweeps.model_sweep import ModelSweep, PendingRun
from flexgen_helm.sweeps.preparing import prepare

_SWITCH_INTERVAL_S = 0.0001
"""How long HELM's adapters and metrics may keep the interpreter from the engine's thread, which gives it away at every
tensor operation and wants it back. With Python's own 5 ms a small model ran up to nine times slower beside them; with
this, 1.6 times, and they lost nothing."""


class SweepRunner(TwoStepRunner):
    """Runs run specs as one job and tells a `SweepDiary` what becomes of them."""

    def __init__(
        self, execution_spec: ExecutionSpec, output_path: str, suite: str, diary: SweepDiary, **flags: bool
    ) -> None:
        """As `TwoStepRunner`; `diary` is told in the thread that calls `run_all`."""
        super().__init__(execution_spec, output_path, suite, **flags)
        self.diary = diary
        self._failures: dict[str, Exception] = {}

    def run_all(self, run_specs: list[RunSpec]) -> None:
        """Run everything that can be run; raises `RunsFailed` at the end if something failed, requests included.

        Raises `NoRoom` at once where nothing can be written; with `exit_on_error`, the first error as it is.
        """
        self.clear_scratch()
        try:
            with _short_turns():
                models, others = prepare(self, self._left(run_specs), self.diary, self._fail)
                self.diary.forecast(models)
                gc.freeze()  # requests of a whole suite live long; looking through them again and again takes long too
                for model in sorted(models, key=lambda model: model.asked.shared_tokens, reverse=True):
                    self._sweep(model)
                for adapted in others:
                    self._run_as_helm_does(adapted)
        finally:
            gc.unfreeze()
            self.clear_scratch()
        if self._failures:
            raise RunsFailed(self._failures)

    def _left(self, run_specs: Sequence[RunSpec]) -> list[RunSpec]:
        """Run specs that are to be run and whose metrics can be made."""
        todo = []
        for run_spec in run_specs:
            if self._is_done(run_spec):
                self.diary.skipped(run_spec)
            else:
                todo.append(run_spec)
        for name, error in find_unusable_metrics(todo).items():
            self._fail(name, error)
        return [run_spec for run_spec in todo if run_spec.name not in self._failures]

    def _sweep(self, model: ModelSweep) -> None:
        """Answer a model's requests and finish its runs; a fault on the way to an answer fails those that are left."""
        if model.client.writes_date:
            self.beginning.keep()
        self.diary.begin(model)
        waiting = {run.name: run for run in model.runs}

        def on_answer(answer: Answer) -> None:
            self.diary.answered(model, answer)

        try:
            with closing(model.answered(on_answer)) as whole:
                for run in whole:
                    del waiting[run.name]
                    self._finish(run)
        except Exception as error:
            if isinstance(error, NoRoom | CacheFull) or (self.exit_on_error and self._failures):
                raise
            for name in waiting:
                self._fail(name, error)
        self.diary.end(model)

    def _finish(self, run: PendingRun) -> None:
        """Write a run's files, and let go of its requests."""
        adapted = run.adapted
        results = [run.results[place] for place in range(run.total)]
        try:
            states = settled(run.states, results)
            self.finish(adapted, ScenarioState(adapted.state.adapter_spec, states, adapted.state.annotator_specs))
        except NoRoom:
            raise
        except Exception as error:
            self._fail(run.name, error)
        else:
            failed = [str(result.error) for result in results if not result.success]
            self.diary.done(run, failed)
            if failed:
                self._failures[run.name] = ExecutorError(failed_requests(failed))
        adapted.state.request_states = []
        adapted.state.request_state_map.clear()
        adapted.state.instances = []

    def _run_as_helm_does(self, adapted: Adapted) -> None:
        """Execute a run of another client, request by request."""
        run_spec, states = adapted.run_spec, adapted.state.request_states
        run = PendingRun(adapted, 0, len(states), 0)
        self.diary.preparing(run_spec, 1, 1)
        try:
            self.finish(adapted, self.executor.execute(adapted.state))
        except NoRoom:
            raise
        except Exception as error:
            self._fail(run_spec.name, error)
        else:
            self.diary.done(run, failed=[])

    def _fail(self, name: str, error: Exception) -> None:
        self._failures[name] = error
        is_expected = isinstance(error, EngineError | ExecutorError)
        trace = "" if is_expected else "".join(traceback.format_exception(error))
        self.diary.failed(name, error, trace)
        if self.exit_on_error:
            raise error


@contextmanager
def _short_turns() -> Iterator[None]:
    before = getswitchinterval()
    setswitchinterval(_SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        setswitchinterval(before)
