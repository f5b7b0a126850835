"""Reads a suite's directory, as written by HELM and a sweep: its runs, their main scores and values per instance."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from engine.errors import ConfigError
from engine.reading import read_bytes
from flexgen_helm.helm.completed import MOST_BYTES, num_unanswered
from flexgen_helm.helm.records.named_classes import named_class
from flexgen_helm.helm.scores import FALLBACK_METRICS, Score, choose, is_plain, recorded_main_metric
from flexgen_helm.sweeps.record import FILE_NAME, Lengths, ModelRecord, RunRecord, SweepRecord, read_record

Status = Literal["done", "failed", "skipped", "unjudged", "unfinished"]

RATIOS = {"bits_per_byte": ("num_bytes", 1 / math.log(2)), "perplexity": ("num_perplexity_tokens", 1.0)}
"""Metrics that HELM computes from sums over all instances: minus log-probability, divided by the first, times the
second.

The perplexity is the exponential of that.
"""
LOWER_IS_BETTER = frozenset({*RATIOS, "error_rate"})
"""Metrics for which this is known without asking them."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a suite."""

    name: str
    path: Path
    status: Status
    model: str
    deployment: str
    score: Score | None
    """The score; None where there are no statistics."""
    error: str | None = None
    """Why the run failed, in one line."""
    failed_requests: int = 0
    """Requests that were not answered; where the run is done they count as empty answers."""
    metric_specs: tuple[Mapping[str, Any], ...] = ()
    seconds: float | None = None
    thinking: Lengths | None = None
    """The lengths of thinking before answers, as recorded by the sweep."""

    @property
    def is_scored(self) -> bool:
        """Whether it ended successfully and has a score."""
        return self.status in ("done", "skipped") and self.score is not None and self.score.value is not None

    @property
    def value(self) -> float | None:
        """The score, if there is one."""
        return self.score.value if self.is_scored and self.score is not None else None

    @property
    def key(self) -> str:
        """Its name without the deployment, so that the same work of one model has the same key whatever served it."""
        return key_of(self.name)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """All readable parts of a suite."""

    path: Path
    record: SweepRecord | None
    """The sweep's record; None for a suite that plain `helm-run` made."""
    runs: Mapping[str, Run] = field(default_factory=dict)
    """The runs by name, in order of names."""

    @property
    def name(self) -> str:
        """The directory's name, which is HELM's name of the suite."""
        return self.path.name

    @property
    def started(self) -> datetime:
        """When the sweep began; without a record, when its first files were written."""
        if self.record is not None:
            return datetime.fromisoformat(self.record.started)
        times = [file.stat().st_mtime for run in self.runs.values() for file in run.path.glob("*.json")]
        return datetime.fromtimestamp(min(times, default=self.path.stat().st_mtime), UTC)

    @property
    def models(self) -> dict[str, ModelRecord]:
        """The record of each deployment."""
        return {each.deployment: each for each in self.record.models} if self.record else {}

    def counterpart(self, run: Run, *, any_model: bool = False) -> Run | None:
        """Return this suite's run of the same work: of the same name, else of the same model by another deployment.

        With `any_model`, also of another model, if either suite has only one.
        """
        if run.name in self.runs:
            return self.runs[run.name]
        same = [each for each in self.runs.values() if each.key == run.key]
        if not same and any_model and len({each.model for each in self.runs.values()}) == 1:
            same = [each for each in self.runs.values() if without_model(each.key) == without_model(run.key)]
        return same[0] if len(same) == 1 else None


def key_of(name: str) -> str:
    """A run's name without the deployment, with sorted arguments: HELM leaves them in the order of the entry."""
    before, _, rest = name.partition(":")
    return f"{before}:{','.join(sorted(part for part in rest.split(',') if not part.startswith('model_deployment=')))}"


def without_model(key: str) -> str:
    """A run's key without its model."""
    before, _, rest = key.partition(":")
    return f"{before}:{','.join(part for part in rest.split(',') if not part.startswith('model='))}"


def find_suite(text: str, output_path: Path) -> Path:
    """Return the directory that `text` names: itself, or a suite of HELM's output directory; `ConfigError` if none."""
    for path in (Path(text), output_path / "runs" / text):
        if path.is_dir():
            return path.resolve()
    raise ConfigError(f"there is no suite {text}: neither a directory of that name nor one in {output_path / 'runs'}")


def read_suite(path: Path) -> Suite:
    """Read a suite's runs and record; `ConfigError` if it has neither, or a record that cannot be read.

    A run whose own files cannot be read counts as failed.
    """
    path = path.resolve()
    record = read_record(path)
    recorded = {run.name: run for run in record.runs} if record else {}
    folders = {folder.name: folder for folder in sorted(path.iterdir()) if _is_run(folder)}
    names = sorted({*folders, *recorded})
    if not names and record is None:
        raise ConfigError(f"{path} holds no runs of HELM and no {FILE_NAME}; name a suite's directory")
    runs = {name: _read_run(path / name, recorded.get(name), is_there=name in folders) for name in names}
    models = {run.model.replace("/", "_"): run.model for run in runs.values()}  # the name of a run holds the former
    models |= {run.model.replace("/", "_"): run.model for run in runs.values() if "/" in run.model}
    runs = {name: replace(run, model=models[run.model.replace("/", "_")]) for name, run in runs.items()}
    return Suite(path=path, record=record, runs=runs)


def _is_run(folder: Path) -> bool:
    """Whether a directory is a finished run: HELM stores other things there, too, and unfinished runs have no files."""
    return folder.is_dir() and (
        (folder / "run_spec.json").is_file() or ",model=" in folder.name or ":model=" in folder.name
    )


def _read_run(path: Path, recorded: RunRecord | None, *, is_there: bool) -> Run:
    model, score = "", None
    specs: tuple[Mapping[str, Any], ...] = ()
    deployment = recorded.deployment if recorded else ""
    error: str | None = "it has not ended, or failed: there is no stats.json"
    if not is_there:
        error = "its directory is not there"
    elif (path / "stats.json").is_file():
        try:
            model, deployment, specs, score = _read_files(path)
            error = None if score.value is not None else f"HELM computed no {score.metric}"
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
            error = f"its files cannot be read: {type(problem).__name__}: {' '.join(str(problem).split())}"
    status: Status = "unfinished" if error and score is None else "done"
    if recorded is not None:
        if recorded.status == "failed":
            status, error = "failed", recorded.error or "no reason is recorded"
        elif recorded.status == "unjudged" and is_there:
            status, error = "unjudged", "it waits for a judge: the same sweep with --judge MODEL judges it"
        elif error and score is None:
            status = "failed"
        else:
            status = recorded.status
    return Run(
        name=path.name,
        path=path,
        status=status,
        model=model or _model_in(path.name),
        deployment=deployment or (recorded.deployment if recorded else ""),
        score=score,
        error=error,
        failed_requests=_num_failed(path, recorded),
        metric_specs=specs,
        seconds=recorded.seconds if recorded else None,
        thinking=recorded.thinking if recorded else None,
    )


def _num_failed(path: Path, recorded: RunRecord | None) -> int:
    """Count the unanswered requests by the run's own file, which later commands do not repeat."""
    return max(num_unanswered(path), recorded.failed_requests if recorded else 0)


def _model_in(name: str) -> str:
    parts = name.replace(":", ",").split(",")
    return next((part.removeprefix("model=") for part in parts if part.startswith("model=")), "")


def _read_files(path: Path) -> tuple[str, str, tuple[Mapping[str, Any], ...], Score]:
    spec = _load(path / "run_spec.json")
    adapter, scenario = spec["adapter_spec"], spec["scenario_spec"]
    metric, split = recorded_main_metric(scenario)
    model = str(adapter["model"])
    score = choose(_load(path / "stats.json"), path.name, model, metric, split)
    if score.value is not None and not math.isfinite(score.value):
        score = replace(score, value=None)
    return model, str(adapter.get("model_deployment") or ""), tuple(spec.get("metric_specs") or ()), score


def score_like(run: Run, suite_path: Path, *, name: str | None = None) -> float | None:
    """Return another suite's score of the same run (or of `name`) by this run's metric and split, if it has one."""
    if run.score is None:
        return None
    try:
        stats = _load(suite_path / (name or run.name) / "stats.json")
        found = choose(stats, run.name, run.model, run.score.metric, run.score.split)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return found.value if (found.metric, found.split) == (run.score.metric, run.score.split) else None


Sums = dict[str, tuple[float, float]]
"""Numerator and denominator of the score of each instance, by its id, summed over trials and windows."""


def instance_sums(run: Run) -> Sums | None:
    """Return the sums from which a run's main score is computed; None if HELM stores no value per instance."""
    if run.score is None:
        return None
    metric, split = run.score.metric, run.score.split
    below, factor = RATIOS.get(metric, (None, 1.0))
    sums: Sums = {}
    try:
        for instance, stats in _plain_instances(_load(run.path / "per_instance_stats.json"), split):
            if below is None and metric in stats:
                pair = float(stats[metric]["sum"]), float(stats[metric]["count"])
            elif below is not None and "logprob" in stats and below in stats:
                pair = -factor * float(stats["logprob"]["sum"]), float(stats[below]["sum"])
            else:
                continue
            so_far = sums.get(instance, (0.0, 0.0))
            sums[instance] = (so_far[0] + pair[0], so_far[1] + pair[1])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return {instance: pair for instance, pair in sums.items() if pair[1]} or None


def _plain_instances(entries: Any, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each unperturbed instance, with its statistics on `split` by name."""
    for entry in entries:
        if not entry.get("perturbation"):
            stats = {
                stat["name"]["name"]: stat
                for stat in entry["stats"]
                if is_plain(stat["name"]) and stat["name"].get("split") == split and stat.get("count")
            }
            yield str(entry["instance_id"]), stats


def is_lower_better(run: Run) -> bool:
    """Whether a lower score is better, according to the run's metrics."""
    metric = run.score.metric if run.score else ""
    if metric in LOWER_IS_BETTER or metric in FALLBACK_METRICS:
        return metric in LOWER_IS_BETTER  # asking takes seconds, because HELM's metrics load what they need
    for spec in run.metric_specs:
        try:
            from helm.benchmark.metrics.metric import MetricInterface, MetricSpec, create_metric

            named_class(spec["class_name"], MetricInterface)
            told = create_metric(MetricSpec(class_name=spec["class_name"], args=spec.get("args") or {})).get_metadata()
        except Exception:  # it lacks a package, knows nothing of itself, or is not to be trusted
            continue
        for each in told:
            if each.name == metric and each.lower_is_better is not None:
                return bool(each.lower_is_better)
    return False


def earlier_suites(suite: Suite) -> list[tuple[Path, SweepRecord]]:
    """Swept suites in the same directory that began before it, in that order; unreadable ones are left out."""
    found = []
    for folder in suite.path.parent.iterdir():
        if folder == suite.path or folder.is_symlink() or not folder.is_dir():  # HELM links the latest suite
            continue
        try:
            record = read_record(folder)
        except ConfigError:
            continue
        if record is not None and datetime.fromisoformat(record.started) < suite.started:
            found.append((folder, record))
    return sorted(found, key=lambda each: datetime.fromisoformat(each[1].started))


def _load(path: Path) -> Any:
    return json.loads(read_bytes(path, ValueError, limit=MOST_BYTES).decode("utf-8"))
