"""The HELM runner that sends all requests of a run to the client at once, after checking what can be checked before."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.executor import ExecutionSpec, Executor, ExecutorError
from helm.benchmark.model_deployment_registry import get_model_deployment
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import Runner, RunnerError
from helm.common.hierarchical_logger import herror, hlog, htrack_block, hwarn
from helm.common.local_context import LocalContext
from helm.common.object_spec import get_class_by_name
from helm.common.request import GeneratedOutput, RequestResult

from flexgen_helm import require_engine

require_engine()

from engine.errors import EngineError  # noqa: E402 - after the line that says whose engine this is
from flexgen_helm.helm.client import FlexGenClient, Progress  # noqa: E402
from flexgen_helm.helm.completed import lack_of  # noqa: E402
from flexgen_helm.helm.engines import Observer  # noqa: E402
from flexgen_helm.helm.preflight import find_problems  # noqa: E402
from flexgen_helm.helm.records.beginning import Beginning  # noqa: E402
from flexgen_helm.helm.records.provenance import provenance_of, write_provenance  # noqa: E402
from flexgen_helm.helm.request_cache import CacheFull  # noqa: E402
from flexgen_helm.helm.requests.results import cut_off, is_cut_off  # noqa: E402
from flexgen_helm.planning.environment import Environment, environment  # noqa: E402
from flexgen_helm.workers.engine_processes import engine_processes  # noqa: E402


class RunsFailed(RunnerError):
    """Some run specs failed; the others are done."""

    def __init__(self, failures: dict[str, Exception]) -> None:
        self.failures = failures
        """The error of each failed run spec, by its name."""
        names = ", ".join(f'"{name}"' for name in failures)
        reason = " ".join(str(next(iter(failures.values()))).split())
        super().__init__(f"Failed runs: [{names}]; {'the first' if len(failures) > 1 else 'reason'}: {reason}")

    @property
    def bad_input(self) -> bool:
        """Whether all failures are caused by the input (not by a fault while running)."""
        return all(
            isinstance(error, EngineError) and type(error) is not EngineError for error in self.failures.values()
        )


def failed_requests(failed: Sequence[str]) -> str:
    """The message that requests failed and why, in one line."""
    return f"{len(failed)} requests failed and count as empty answers; the first: {failed[0]}"


class FlexGenRunner(Runner):
    """HELM's runner with whole-run execution; for models of other clients it is HELM's runner unchanged.

    `progress`, if set, is called with (requests done, requests in total, tokens) of the current run, in the thread that
    executes it. Set it on an instance, or as a staticmethod of a subclass.
    """

    progress: Progress | None = None

    def __init__(
        self,
        execution_spec: ExecutionSpec,
        output_path: str,
        suite: str,
        skip_instances: bool,
        cache_instances: bool,
        cache_instances_only: bool,
        skip_completed_runs: bool,
        exit_on_error: bool,
    ) -> None:
        flags = skip_instances, cache_instances, cache_instances_only, skip_completed_runs, exit_on_error
        super().__init__(execution_spec, output_path, suite, *flags)
        context = self.executor.context
        if isinstance(context, LocalContext):
            from flexgen_helm.helm.requests.known_tokens import KnownTokens  # imports transformers

            context.tokenizer = KnownTokens(context.tokenizer.credentials, context.cache_backend_config)
        self.judge_deployment: str | None = None
        """The deployment that judges runs, if it is known."""
        self._asked: RunSpec | None = None
        """The run spec whose completeness is being examined."""
        self._completed: dict[str, bool] = {}
        """The runs that were examined, by directory: that reads all their files, so once is enough."""
        self.environment: Callable[[], Environment] = environment
        """Returns the environment that records name."""
        self.beginning = Beginning(Path(self.runs_path))
        self.executor: WholeRunExecutor = WholeRunExecutor(self.executor, self._report, self.tell, self.beginning)

    def _report(self, done: int, total: int, tokens: int) -> None:
        if self.progress is not None:
            self.progress(done, total, tokens)

    def tell(self, line: str) -> None:
        """Report a line about a model before its first requests are answered; to HELM's log, unless overridden."""
        hlog(line)

    def run_all(self, run_specs: list[RunSpec]) -> None:
        """Run everything that can be run; raises `RunsFailed` at the end if something failed.

        With `exit_on_error`, raises the first error itself; `CacheFull` in any case. Run specs whose metrics cannot be
        created, or whose answers leave no room for prompts, fail before anything runs.
        """
        try:
            self._run_all(run_specs)
        finally:
            self._completed.clear()

    def _run_all(self, run_specs: list[RunSpec]) -> None:
        failures: dict[str, Exception] = {}
        if not self.dry_run and not self.cache_instances_only:
            asked = [spec for spec in run_specs if not self._is_done(spec)]
            assert isinstance(self.executor, WholeRunExecutor)
            if any(map(self.executor.is_ours, {spec.adapter_spec.model_deployment for spec in asked} - {""})):
                engine_processes.prepare()  # while HELM makes the first run's requests
            failures.update(find_problems(asked))
        for error in failures.values():
            if self.exit_on_error:
                raise error
            herror(error)
        ready = [run_spec for run_spec in run_specs if run_spec.name not in failures]
        for run_spec in ready:
            try:
                with htrack_block(f"Running {run_spec.name}"):
                    self.run_one(run_spec)
            except Exception as error:
                if self.exit_on_error or isinstance(error, CacheFull):
                    raise
                expected = isinstance(error, EngineError | ExecutorError)
                herror(f"{run_spec.name}: {error if expected else traceback.format_exc()}")
                failures[run_spec.name] = error
        if failures:
            raise RunsFailed(failures)

    def run_one(self, run_spec: RunSpec) -> None:
        """Run one run spec as HELM does; writes the record next to the files of a run of our client."""
        assert isinstance(self.executor, WholeRunExecutor)
        self._asked = run_spec
        self.executor.client = None  # a run that is skipped as completed executes nothing
        super().run_one(run_spec)
        if self.executor.client is not None and not self.skip_instances:
            self.keep_provenance(run_spec, self.executor.client, Path(self._get_run_path(run_spec)))

    def keep_provenance(
        self, run_spec: RunSpec, client: FlexGenClient, folder: Path, judged: Mapping[str, Any] | None = None
    ) -> None:
        """Write the record of a run with its files in `folder`, with its judge; raises `OSError`."""
        deployment = str(run_spec.adapter_spec.model_deployment)
        found = provenance_of(run_spec.name, deployment, client, self.beginning.moment, folder, self.environment())
        if judged is not None:
            found = dataclasses.replace(found, judge=judged)
        write_provenance(folder, found)

    def _is_run_completed(self, run_path: str) -> bool:
        """Whether a run matches the request, its files can be read, and all its requests were answered.

        HELM would only check that the files exist.
        """
        if not super()._is_run_completed(run_path):
            return False
        if run_path not in self._completed:
            lack = lack_of(Path(run_path), self._asked, self.judge_deployment)
            if lack:
                hwarn(f"{run_path} does not count as completed, because {lack}; it is run again")
            self._completed[run_path] = not lack
        return self._completed[run_path]

    def _is_done(self, run_spec: RunSpec) -> bool:
        self._asked = run_spec
        return self.skip_completed_runs and self._is_run_completed(self._get_run_path(run_spec))


class WholeRunExecutor(Executor):
    """Executes a run's requests by one call of our client; those of other clients as HELM does."""

    def __init__(
        self,
        stock: Executor,
        progress: Progress,
        tell: Callable[[str], None] = hlog,
        beginning: Beginning | None = None,
    ) -> None:
        """`tell` is called with each line that is to be shown before a model's first answers.

        `beginning` is the suite's, by default that of `stock` if it has one.
        """
        self.beginning: Beginning | None = beginning or (
            stock.beginning if isinstance(stock, WholeRunExecutor) else None
        )
        self.execution_spec = stock.execution_spec
        self.context = stock.context  # with its clients and caches, shared with HELM's services
        self._progress = progress
        self._tell = tell
        self._told: dict[FlexGenClient, list[str]] = {}
        self.failed: list[str] = []
        """The errors of requests of the latest run that count as empty answers."""
        self.cut_off = 0
        """The number of its answers that are empty because thinking used up their tokens."""
        self.observe: Observer | None = None
        """Called with the engine's sweeps."""
        self.client: FlexGenClient | None = None
        """Our client that answered the latest requests."""

    def execute(self, scenario_state: ScenarioState) -> ScenarioState:
        """Fill in all results; raises `ExecutorError` for a fatal request, `EngineError` for bad input or a fault.

        Prompts are checked before the engine loads its weights.
        """
        states: list[RequestState] = scenario_state.request_states
        self.failed, self.cut_off = [], 0
        client = self.client = None if self.execution_spec.dry_run else self.client_of(states)
        if client is None:
            as_helm_does: ScenarioState = super().execute(scenario_state)
            return as_helm_does
        requests = [state.request for state in states]
        with htrack_block(f"{type(self).__name__}.execute"):
            client.check(requests)
            if self.beginning is not None and client.writes_date:
                self.beginning.keep()
            self._tell_notes(client)
            results = client.make_requests(requests, self._progress, self.observe)
            self._tell_notes(client)  # about cached answers
            hlog(f"Processed {len(results)} requests")
        request_states = settled(states, results)
        self.failed = [str(result.error) for result in results if not result.success]
        self.cut_off = sum(is_cut_off(each) for result in results for each in result.completions)
        if self.cut_off:
            hlog(cut_off(self.cut_off))
        return ScenarioState(
            adapter_spec=scenario_state.adapter_spec,
            request_states=request_states,
            annotator_specs=scenario_state.annotator_specs,
        )

    def _tell_notes(self, client: FlexGenClient) -> None:
        told = self._told.setdefault(client, [])
        for line in client.notes:
            if line not in told:
                told.append(line)
                self._tell(line)

    def client_of(self, states: Sequence[RequestState]) -> FlexGenClient | None:
        """Our client, if all requests go to one deployment of it."""
        deployments = {state.request.model_deployment for state in states}
        return self.our_client(deployments.pop()) if len(deployments) == 1 and self.is_ours(*deployments) else None

    def is_ours(self, deployment: str) -> bool:
        """Whether our client serves a deployment."""
        if not isinstance(self.context, LocalContext):
            return False
        return issubclass(get_class_by_name(get_model_deployment(deployment).client_spec.class_name), FlexGenClient)

    def our_client(self, deployment: str) -> FlexGenClient:
        """The client of a deployment that is ours."""
        assert isinstance(self.context, LocalContext)
        client = self.context.client._get_client(deployment)
        assert isinstance(client, FlexGenClient)
        if self.beginning is not None:
            client.begin(self.beginning.moment)
        return client


def settled(states: Sequence[RequestState], results: Sequence[RequestResult]) -> list[RequestState]:
    """The states with their results, errors treated as `Executor.process` treats them.

    Raises `ExecutorError` for a fatal error, and where nothing was answered: a score of empty answers means nothing.
    """
    fatal = [
        (state, result)
        for state, result in zip(states, results, strict=True)
        if not result.success and not _is_survivable(result)
    ]
    if fatal:
        state, result = fatal[0]
        instance = f"instance {state.instance.id}"
        raise ExecutorError(f"{len(fatal)} of {len(states)} requests failed; the first ({instance}): {result.error}")
    if states and not any(result.success for result in results):  # a score of empty answers would mean nothing
        raise ExecutorError(f"all {len(states)} requests failed; the first: {results[0].error}")
    done = []
    for state, result in zip(states, results, strict=True):
        if not result.success:
            hwarn(f"Non-fatal error treated as empty completion: {result.error}")
            empty = GeneratedOutput(text="", logprob=0, tokens=[])
            result = dataclasses.replace(result, completions=[empty])
        done.append(dataclasses.replace(state, result=result))
    return done


def _is_survivable(result: RequestResult) -> bool:
    return result.error_flags is not None and not result.error_flags.is_fatal
