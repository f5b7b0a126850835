"""The runner of `flexgen-helm run`: it finds bad input in any run before the first one, and shows progress."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.executor import ExecutorError
from helm.benchmark.run_spec import RunSpec

from engine.errors import EngineError
from engine.schedule.timing import SweepTiming
from flexgen_helm.helm.preflight import find_problems
from flexgen_helm.helm.requests.results import cut_off
from flexgen_helm.helm.runner import FlexGenRunner, RunsFailed, WholeRunExecutor, failed_requests
from flexgen_helm.helm.scores import short_name
from flexgen_helm.judging.kinds import needs_judge
from flexgen_helm.terminal.progress import Progress


class CommandLineRunner(FlexGenRunner):
    """Runs all run specs, or none if one of them cannot be run: then raises its `EngineError`."""

    display = Progress()
    """The progress display; on the class, because HELM creates the runner from the class's name."""

    longest_pass_s: ClassVar[float] = 0.0
    """Seconds of the engine's longest sweep so far, without waiting for weights that were still being loaded."""

    def __init__(self, *args: Any, **flags: Any) -> None:
        super().__init__(*args, **flags)
        assert isinstance(self.executor, WholeRunExecutor)
        self.executor.observe = self._observe

    @staticmethod
    def _observe(engine: object, timing: SweepTiming) -> None:
        seconds = timing.host_s + timing.sweep_s - timing.load_s
        CommandLineRunner.longest_pass_s = max(CommandLineRunner.longest_pass_s, seconds)

    def run_all(self, run_specs: list[RunSpec]) -> None:
        """Check all, then run all; raises `RunsFailed` at the end if a run failed, or requests of it did."""
        if not (self.dry_run or self.skip_instances or self.cache_instances_only):
            todo = [run_spec for run_spec in run_specs if not self._is_done(run_spec)]
            self._check(todo)
            self._tell_of_judges(todo)
        self._incomplete: dict[str, Exception] = {}
        try:
            super().run_all(run_specs)
        except RunsFailed as error:
            raise RunsFailed({**error.failures, **self._incomplete}) from error
        if self._incomplete:
            raise RunsFailed(self._incomplete)

    def run_one(self, run_spec: RunSpec) -> None:
        """Run one run spec under its own heading; requests that failed are noted there."""
        name = short_name(run_spec.name)
        self.display.begin(name)
        super().run_one(run_spec)
        if isinstance(self.executor, WholeRunExecutor) and (failed := self.executor.failed):
            self.executor.failed = []  # a run that is skipped as completed executes nothing
            self.display.notes.append(f"{name}: {failed_requests(failed)}")
            self._incomplete[run_spec.name] = ExecutorError(failed_requests(failed))
        if isinstance(self.executor, WholeRunExecutor) and (count := self.executor.cut_off):
            self.executor.cut_off = 0
            self.display.notes.append(f"{name}: {cut_off(count)}")

    def tell(self, line: str) -> None:
        """Show a line at the beginning of a run."""
        print(line, file=sys.stderr)

    @staticmethod
    def progress(done: int, total: int, tokens: int) -> None:
        """Pass on what the client reports."""
        CommandLineRunner.display(done, total, tokens)

    def _tell_of_judges(self, run_specs: list[RunSpec]) -> None:
        """Say before the first answer that a model is called for verdicts, which may need an account."""
        if judged := [short_name(run_spec.name) for run_spec in run_specs if needs_judge(run_spec)]:
            more = f" and {len(judged) - 1} more" if len(judged) > 1 else ""
            self.tell(
                f"{judged[0]}{more}: HELM asks the models that its annotators "
                "name for verdicts, with the keys in credentials.conf, when all is answered; flexgen-helm sweep "
                "--judge MODEL has a model of yours judge"
            )

    def _check(self, run_specs: list[RunSpec]) -> None:
        for problem in find_problems(run_specs).values():
            raise problem
        if len(run_specs) == 1:
            return  # a run checks its own prompts before the engine loads
        executor = self.executor
        self.executor = _Rehearsal(executor, self.progress)
        try:
            for run_spec in run_specs:
                self._rehearse(run_spec)
        finally:
            self.executor = executor

    def _rehearse(self, run_spec: RunSpec) -> None:
        """Run a run spec up to its requests."""
        try:
            super().run_one(run_spec)
        except EngineError as error:
            raise type(error)(f"{run_spec.name}: {error}") from None
        except Exception:
            return  # there are no requests; the run itself will report why


class _RequestsAreFine(Exception):
    """Ends a rehearsal."""


class _Rehearsal(WholeRunExecutor):
    """Checks a run's requests instead of executing them."""

    def execute(self, scenario_state: ScenarioState) -> ScenarioState:
        """Raise `EngineError` for a request that cannot be run, `_RequestsAreFine` otherwise."""
        client = self.client_of(scenario_state.request_states)
        if client is not None:
            client.check([state.request for state in scenario_state.request_states])
        raise _RequestsAreFine
