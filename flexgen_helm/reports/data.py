"""The contents of a suite's report: its scores and others', its speed, its drift, and the trend over suites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.reading import read_json
from flexgen_helm.helm.scores import short_name
from flexgen_helm.judging.verdicts import Verdicts
from flexgen_helm.planning.environment import Hardware
from flexgen_helm.reports.drift import Drift, References, compression
from flexgen_helm.suites.answers import Answers, read_answers
from flexgen_helm.suites.comparison import SLOWDOWN, Comparison, ScoreChange, compare_suites
from flexgen_helm.suites.speed import difference_of, is_slower, tokens_per_second
from flexgen_helm.suites.suite import Run, Suite, earlier_suites, key_of, read_suite, score_like
from flexgen_helm.sweeps.record import Lengths, ModelRecord, SweepRecord

JSON_NAME = "report.json"
VERSION = 1
MOST_SUITES = 30
"""The most suites in a trend, this one included."""


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run of the report."""

    name: str
    model: str
    deployment: str
    status: str
    error: str | None
    metric: str
    split: str
    instances: int
    score: float | None
    previous: float | None
    change: ScoreChange | None
    """Against the previous suite; None without one."""
    reference: float | None
    reference_difference: float | None
    """Ours less the reference's, on the same instances: those of the run, or the sample that `verify` took."""
    failed_requests: int
    seconds: float | None
    trend: tuple[float | None, ...]
    """The score in each suite of the trend."""
    answers: Answers | None
    """What the model wrote, where that is more than a few words."""
    thinking: Lengths | None
    """The lengths of its thinking; None where there was none, or where the record does not know."""


@dataclass(frozen=True, kw_only=True)
class SpeedPoint:
    """A model's speed in one suite of the trend."""

    tokens_per_second: float | None
    is_comparable: bool
    """Whether it ran on the same hardware, with the same work as this suite."""
    is_regression: bool
    """Slower than the one before it, which is comparable too."""


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One model of the report."""

    record: ModelRecord
    compression: str
    tokens_per_second: float | None
    previous: float | None
    verdict: str
    """Against the previous suite; empty without one."""
    reason: str
    trend: tuple[SpeedPoint, ...]


@dataclass(frozen=True, kw_only=True)
class TrendSuite:
    """A suite of the trend."""

    name: str
    started: str
    regressions: tuple[str, ...]
    """Runs that its own report found worse, missing or failed."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The contents of a report."""

    suite: str
    status: str
    """"finished", "unfinished", or "unrecorded" for a suite that was not a sweep's."""
    started: str
    finished: str | None
    previous: str | None
    reference: str | None
    runs: tuple[RunRow, ...]
    models: tuple[ModelRow, ...]
    judge: ModelRow | None
    """The judge of the suite's runs, if its last sweep had one."""
    verdicts: tuple[str, ...]
    """For each run that has answers without a verdict: how many and why."""
    drift: tuple[Drift, ...]
    comparison: Comparison | None
    trend: tuple[TrendSuite, ...]
    """Oldest first; the last is this suite."""
    hardware: Hardware | None
    versions: Mapping[str, str]
    commit: str | None

    @property
    def failed_runs(self) -> list[RunRow]:
        """Runs without a result."""
        return [run for run in self.runs if run.status in ("failed", "unfinished")]

    def mapping(self) -> dict[str, Any]:
        """The report as JSON."""
        told = {"version": VERSION, **asdict(self)}
        told["comparison"] = None if self.comparison is None else self.comparison.mapping()
        told["regressions"] = list(self.trend[-1].regressions)
        return told


def gather(suite: Suite, previous: Suite | None = None, reference: Path | None = None) -> Report:
    """Read everything that the report of `suite` needs.

    `previous` is the latest earlier suite in the same directory that has runs in common, if none is given. `reference`
    is a suite's directory or a `fidelity.json`; `ConfigError` where it is neither.
    """
    earlier = earlier_suites(suite)
    previous = previous or _previous(suite, earlier)
    comparison = compare_suites(previous, suite) if previous else None
    references = References(reference, is_one_model=len({run.model for run in suite.runs.values()}) == 1)
    failures = {change.name for change in comparison.failures} if comparison else set()
    trend = earlier[-(MOST_SUITES - 1) :]
    rows, drift = [], []
    changes = {change.name: change for change in comparison.scores} if comparison else {}
    for run in suite.runs.values():
        found = references.drift(run)
        if found is not None:
            drift.append(found)
        past = [score_like(run, folder) for folder, _ in trend]
        rows.append(_run_row(run, changes.get(run.name), (*past, run.value), references.score(run, found)))
    record = suite.record
    return Report(
        suite=suite.name,
        status="unrecorded" if record is None else "finished" if record.finished else "unfinished",
        started=suite.started.isoformat(timespec="seconds"),
        finished=record.finished if record else None,
        previous=previous.name if previous else None,
        reference=reference.name if reference else None,
        runs=tuple(rows),
        models=tuple(
            _model_row(model, suite, comparison, [each for _, each in trend]) for model in suite.models.values()
        ),
        judge=None if record is None or record.judge is None else _judge_row(record.judge),
        verdicts=() if record is None else tuple(_verdicts(record)),
        drift=tuple(drift),
        comparison=comparison,
        trend=(
            *(TrendSuite(name=folder.name, started=each.started, regressions=_told(folder)) for folder, each in trend),
            TrendSuite(name=suite.name, started=suite.started.isoformat(), regressions=tuple(sorted(failures))),
        ),
        hardware=record.hardware if record else None,
        versions=record.versions if record else {},
        commit=record.commit if record else None,
    )


def _previous(suite: Suite, earlier: list[tuple[Path, SweepRecord]]) -> Suite | None:
    keys = {run.key for run in suite.runs.values()}
    for folder, record in reversed(earlier):
        if keys & {key_of(run.name) for run in record.runs}:
            return read_suite(folder)
    return None


def _run_row(
    run: Run, change: ScoreChange | None, trend: tuple[float | None, ...], reference: tuple[float | None, float | None]
) -> RunRow:
    score = run.score
    answers = read_answers(run.path)
    return RunRow(
        name=run.name,
        model=run.model,
        deployment=run.deployment,
        status=run.status,
        error=run.error,
        metric=score.metric if score else "",
        split=score.split if score else "",
        instances=score.num_instances if score else 0,
        score=run.value,
        previous=change.before if change else None,
        change=change,
        reference=reference[0],
        reference_difference=reference[1],
        failed_requests=run.failed_requests,
        seconds=run.seconds,
        trend=trend,
        answers=answers,
        thinking=run.thinking if answers is not None else None,
    )


def _model_row(model: ModelRecord, suite: Suite, comparison: Comparison | None, past: list[SweepRecord]) -> ModelRow:
    speeds = {each.deployment: each for each in comparison.speeds} if comparison else {}
    speed = speeds.get(model.deployment)
    assert suite.record is not None
    points: list[SpeedPoint] = []
    last: tuple[SweepRecord, float] | None = None
    for record in (*past, suite.record):
        found = next((each for each in record.models if each.deployment == model.deployment), None)
        pace = tokens_per_second(found) if found else None
        is_worse = False
        if pace is not None:
            is_like_last = last is not None and difference_of(last[0], record, model.deployment) is None
            is_worse = last is not None and is_like_last and is_slower(last[1], pace, SLOWDOWN)
            last = record, pace
        is_comparable = record is suite.record or difference_of(record, suite.record, model.deployment) is None
        points.append(SpeedPoint(tokens_per_second=pace, is_comparable=is_comparable, is_regression=is_worse))
    return ModelRow(
        record=model,
        compression=compression(model.policy),
        tokens_per_second=tokens_per_second(model),
        previous=speed.before if speed else None,
        verdict=speed.verdict if speed else "",
        reason=speed.reason if speed else "",
        trend=tuple(points),
    )


def _judge_row(judge: ModelRecord) -> ModelRow:
    """The judge's row, without a comparison: its requests depend on the answers of other models."""
    return ModelRow(
        record=judge,
        compression=compression(judge.policy),
        tokens_per_second=tokens_per_second(judge),
        previous=None,
        verdict="",
        reason="",
        trend=(),
    )


def _verdicts(record: SweepRecord) -> Iterator[str]:
    for run in record.runs:
        found = Verdicts(
            read=run.verdicts - run.unreadable_verdicts - run.missing_verdicts,
            unreadable=run.unreadable_verdicts,
            unanswered=run.missing_verdicts,
        )
        if found.read < found.asked:
            yield f"{short_name(run.name)}: {found.told}"


def _told(folder: Path) -> tuple[str, ...]:
    """The regressions in an earlier suite's own report; none where there is no such report."""
    try:
        found = read_json(folder / JSON_NAME, ConfigError)["regressions"]
        return tuple(each for each in found if isinstance(each, str))
    except (ConfigError, KeyError, TypeError):
        return ()
