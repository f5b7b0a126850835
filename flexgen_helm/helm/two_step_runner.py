"""HELM's `run_one` in two halves, so that the requests of many runs can be answered together between them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from helm.benchmark.adaptation.adapters.adapter_factory import AdapterFactory
from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.data_preprocessor import DataPreprocessor
from helm.benchmark.executor import ExecutionSpec
from helm.benchmark.metrics.metric import MetricSpec, PerInstanceStats, create_metric
from helm.benchmark.metrics.statistic import Stat
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import (
    downsample_eval_instances,
    remove_per_instance_stats_nans,
    remove_stats_nans,
)
from helm.benchmark.scenarios.scenario import (
    EVAL_SPLITS,
    Instance,
    Scenario,
    create_scenario,
    get_scenario_cache_path,
    with_instance_ids,
)
from helm.common.general import write
from helm.common.hierarchical_logger import hlog, htrack_block
from helm.common.local_context import LocalContext

from engine.errors import EngineError, named
from engine.reading import read_bytes
from flexgen_helm.helm.completed import MOST_BYTES
from flexgen_helm.helm.dataclass_json import dumps
from flexgen_helm.helm.engines import engines
from flexgen_helm.helm.records.provenance import FILE_NAME
from flexgen_helm.helm.runner import FlexGenRunner, WholeRunExecutor
from flexgen_helm.helm.scratch import SCRATCH
from flexgen_helm.helm.window_checks import adapted

if TYPE_CHECKING:
    from flexgen_helm.helm.requests.known_tokens import KnownTokens

_LAST_FILE = "per_instance_stats.json"
"""The file that HELM writes last: a run that has all files counts as completed."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class NoRoom(EngineError):
    """The output directory cannot be written, so no run in it can be."""


@dataclass(eq=False)
class Adapted:
    """A run whose requests are made."""

    run_spec: RunSpec
    scenario: Scenario
    state: ScenarioState
    num_tokens: dict[str, int] = field(default_factory=dict)
    """The numbers of tokens of prompts, as HELM counts them, if known."""


class TwoStepRunner(FlexGenRunner):
    """Runs `adapt`, and later `finish` on its result with all answers: together, what HELM's `run_one` does.

    Call both in the main thread: some of HELM's metrics use signals. A run's files are written to another directory and
    moved when they are complete, so that a killed run does not look completed.
    """

    def __init__(self, execution_spec: ExecutionSpec, output_path: str, suite: str, **flags: bool) -> None:
        """`flags`: HELM's `skip_completed_runs` and `exit_on_error`."""
        super().__init__(
            execution_spec, output_path, suite, skip_instances=False, cache_instances=False, cache_instances_only=False,
            **flags,
        )  # fmt: skip

    @property
    def known_tokens(self) -> KnownTokens:
        """HELM's tokenizers, as used by its adapters and metrics."""
        assert isinstance(self.executor.context, LocalContext), "runs in two steps have no server"
        return cast("KnownTokens", self.executor.context.tokenizer)

    def adapt(self, run_spec: RunSpec) -> Adapted:
        """Make a run's requests; raises what the scenario raises."""
        parallelism = self.executor.execution_spec.parallelism
        scenario = create_scenario(run_spec.scenario_spec)
        with htrack_block("scenario.get_instances"):
            instances: list[Instance] = scenario.get_instances(get_scenario_cache_path(self.output_path, scenario.name))
        if any(instance.id is None for instance in instances):
            instances = with_instance_ids(instances)
        spec = run_spec.adapter_spec
        if spec.max_eval_instances is not None:
            instances = downsample_eval_instances(instances, spec.max_eval_instances, spec.eval_splits or EVAL_SPLITS)
        instances = DataPreprocessor(run_spec.data_augmenter_spec).preprocess(instances, parallelism)
        adapter = AdapterFactory.get_adapter(spec, self.tokenizer_service)
        states = adapted(adapter, instances, parallelism, self.known_tokens)
        return Adapted(run_spec, scenario, ScenarioState(spec, states, run_spec.annotators))

    def finish(self, made: Adapted, state: ScenarioState) -> None:
        """Annotate, compute metrics and write all files of a run whose results are in `state`.

        Raises `NoRoom` when its directory cannot be written, and what annotators and metrics raise.
        """
        self.score(made, self.annotator_executor.execute(state))

    def score(
        self,
        made: Adapted,
        state: ScenarioState,
        seen: Callable[[MetricSpec, ScenarioState], ScenarioState] = lambda metric_spec, state: state,
        judged: Mapping[str, Any] | None = None,
    ) -> None:
        """`finish` for a run that is annotated; metrics get `seen`.

        `judged` is the record's entry about its judge.
        """
        stats: list[Stat] = []
        per_instance_stats: list[PerInstanceStats] = []
        for metric_spec in made.run_spec.metric_specs:
            metric = create_metric(metric_spec)
            with htrack_block(metric):
                found = metric.evaluate(
                    seen(metric_spec, state),
                    self.metric_service,
                    self.eval_cache_path,
                    self.executor.execution_spec.parallelism,
                )
            stats.extend(found.aggregated_stats)
            per_instance_stats.extend(found.per_instance_stats)
        hlog(f"Generated {len(stats)} stats.")
        engines.guard.check_not_asked()
        self._write(
            made,
            {
                "run_spec.json": made.run_spec,
                "scenario.json": made.scenario,
                "scenario_state.json": state,
                "stats.json": remove_stats_nans(stats),
                _LAST_FILE: remove_per_instance_stats_nans(per_instance_stats),
            },
            judged,
        )

    def hold(self, made: Adapted, state: ScenarioState) -> None:
        """Write a run whose results are in `state` as far as possible without annotations.

        It does not look completed: the run's former files are removed. Raises `NoRoom`.
        """
        target = Path(self._get_run_path(made.run_spec))
        for name in (_LAST_FILE, FILE_NAME, "stats.json"):
            (target / name).unlink(missing_ok=True)
        files = {"run_spec.json": made.run_spec, "scenario.json": made.scenario, "scenario_state.json": state}
        self._write(made, files)

    def held(self, run_spec: RunSpec) -> Adapted:
        """Return a run that `hold` has written, with its results; raises `EngineError` if it does not exist."""
        from helm.common.codec import from_json  # which imports spacy

        folder = Path(self._get_run_path(run_spec))
        try:
            text = read_bytes(folder / "scenario_state.json", EngineError, limit=MOST_BYTES)
            return Adapted(run_spec, create_scenario(run_spec.scenario_spec), from_json(text, ScenarioState))
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"{folder} cannot be read back ({named(error)}); run the same command again") from None

    def clear_scratch(self) -> None:
        """Remove what unfinished runs have left."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def _scratch(self) -> Path:
        """Create a directory next to the suite's, in which HELM would take every directory for a run."""
        return Path(f"{self.runs_path}{SCRATCH}")

    def _write(self, made: Adapted, files: dict[str, Any], judged: Mapping[str, Any] | None = None) -> None:
        run_spec = made.run_spec
        scratch, target = self._scratch / run_spec.name, Path(self._get_run_path(run_spec))
        try:
            scratch.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                write(str(scratch / name), dumps(content))
                _settle(scratch / name)
            names = [FILE_NAME] if _LAST_FILE in files and self._keep_provenance(made, scratch, judged) else []
            target.mkdir(parents=True, exist_ok=True)
            (target / _LAST_FILE).unlink(missing_ok=True)  # not completed until all new files are there
            for name in (*names, *files):
                os.replace(scratch / name, target / name)
            _settle(target)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            free = shutil.disk_usage(self.output_path).free
            raise NoRoom(
                f"{target} cannot be written ({error.strerror}); {free / 1e6:.1f} MB are free in {self.output_path}: "
                "free some and run the same command again to continue"
            ) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _keep_provenance(self, made: Adapted, scratch: Path, judged: Mapping[str, Any] | None) -> bool:
        """Write the record of a run of our client next to its files; False for a run of another client."""
        assert isinstance(self.executor, WholeRunExecutor)
        client = self.executor.client_of(made.state.request_states)
        if client is not None:
            self.keep_provenance(made.run_spec, client, scratch, judged)
        return client is not None


def _settle(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
