"""The changes from one suite to another: scores beyond noise, missing runs, slower models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from flexgen_helm.suites import bootstrap
from flexgen_helm.suites.bootstrap import Mean, Noise
from flexgen_helm.suites.speed import SpeedChange, compare_speed
from flexgen_helm.suites.suite import Run, Suite, instance_sums, is_lower_better

CONFIDENCE = 0.95
SLOWDOWN = 0.1

Verdict = Literal["same", "worse", "better", "missing", "failed", "unscored", "new", "not compared"]
FAILURES = ("worse", "missing", "failed", "unscored")


@dataclass(frozen=True, kw_only=True)
class ScoreChange:
    """One run, or the mean of several, in both suites."""

    name: str
    verdict: Verdict
    model: str = ""
    metric: str = ""
    before: float | None = None
    after: float | None = None
    low: float | None = None
    """With `high`: the interval of the difference, uncorrected."""
    high: float | None = None
    p_value: float | None = None
    """Corrected for the number of scores compared."""
    how: str = ""
    """How its noise was determined: "paired", "unpaired" or "whole"."""
    instances: int = 0
    """The number of instances in the second suite."""
    changed: int = 0
    """Instances whose values differ, where they are paired."""
    reason: str = ""

    @property
    def difference(self) -> float | None:
        """The second score minus the first."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def is_failure(self) -> bool:
        """Whether it fails the gate."""
        return self.verdict in FAILURES


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two suites side by side."""

    before: str
    after: str
    confidence: float
    slowdown: float
    scores: tuple[ScoreChange, ...]
    """One change for each run of either suite, in order of names."""
    means: tuple[ScoreChange, ...]
    """The mean over the runs of one model with one metric, where there are several."""
    speeds: tuple[SpeedChange, ...]

    @property
    def failures(self) -> list[ScoreChange | SpeedChange]:
        """The changes that fail the gate."""
        changes: list[ScoreChange | SpeedChange] = [*self.scores, *self.means, *self.speeds]
        return [change for change in changes if change.is_failure]

    @property
    def num_tests(self) -> int:
        """Number of compared scores, for which p-values are corrected."""
        return sum(change.p_value is not None for change in (*self.scores, *self.means))

    def mapping(self) -> dict[str, Any]:
        """The comparison as JSON."""
        return {
            "before": self.before,
            "after": self.after,
            "confidence": self.confidence,
            "slowdown": self.slowdown,
            "failed": bool(self.failures),
            "scores_compared": self.num_tests,
            "scores": [{**asdict(each), "difference": each.difference} for each in self.scores],
            "means": [{**asdict(each), "difference": each.difference} for each in self.means],
            "speeds": [{**asdict(each), "change": each.change} for each in self.speeds],
        }


def compare_suites(
    before: Suite, after: Suite, *, confidence: float = CONFIDENCE, slowdown: float = SLOWDOWN
) -> Comparison:
    """Compare run by run and model by model.

    A score has changed if a bootstrap over instances says so with `confidence`, after Holm's correction for all
    compared scores; a model is slower if it computes fewer tokens per second by more than the fraction `slowdown`.
    """
    matched: list[tuple[Run, Run]] = []
    settled: list[ScoreChange] = []
    seen = set()
    for run in before.runs.values():
        other = after.counterpart(run)
        if other is not None:
            seen.add(other.name)
        if other is not None and run.is_scored and other.is_scored and not other.failed_requests:
            matched.append((run, other))
        else:
            settled.append(_without_scores(run, other))
    settled += [_without_scores(None, run) for run in after.runs.values() if run.name not in seen]
    tested, means = _test(matched, confidence)
    return Comparison(
        before=before.name,
        after=after.name,
        confidence=confidence,
        slowdown=slowdown,
        scores=tuple(sorted([*tested, *settled], key=lambda change: change.name)),
        means=tuple(means),
        speeds=tuple(compare_speed(before.record, after.record, slowdown)),
    )


def _without_scores(before: Run | None, after: Run | None) -> ScoreChange:
    """A run that has no score in one of the suites, or is in one only."""
    run = after or before
    assert run is not None
    change = ScoreChange(
        name=run.name,
        verdict="not compared",
        model=run.model,
        metric=run.score.metric if run.score else "",
        before=before.value if before else None,
        after=after.value if after else None,
        instances=after.score.num_instances if after and after.score else 0,
    )
    had_failed = before is not None and before.status in ("failed", "unfinished")
    if after is None:
        return replace(
            change, verdict="missing", reason="not in this suite" + (", had failed before" if had_failed else "")
        )
    if after.status in ("failed", "unfinished"):
        return replace(change, verdict="failed", reason=f"{after.error}{' (as before)' if had_failed else ''}")
    if after.failed_requests:
        reason = f"{after.failed_requests} of its requests failed and count as empty answers"
        as_before = " (as before)" if before is not None and before.failed_requests else ""
        return replace(change, verdict="failed", reason=f"{reason}{as_before}")
    if not after.is_scored:
        verdict: Verdict = "unscored" if before is not None and before.is_scored else "not compared"
        return replace(change, verdict=verdict, reason=after.error or "no score")
    return replace(change, verdict="new", reason="not in the other suite" if before is None else "had no score before")


def _test(matched: Sequence[tuple[Run, Run]], confidence: float) -> tuple[list[ScoreChange], list[ScoreChange]]:
    """Test the runs that are scored in both suites, and their means, which reveal many small losses together."""
    samples = bootstrap.num_samples(len(matched) + 1, confidence)
    changes: list[ScoreChange] = []
    runs = [after for _, after in matched]
    groups: dict[tuple[str, str], Mean] = {}
    members: dict[tuple[str, str], list[tuple[Run, Run]]] = defaultdict(list)
    for before, after in matched:
        noise = _noise(before, after, confidence, samples)
        changes.append(_change(before, after, noise))
        if noise is not None and after.score is not None:
            group = (after.model, after.score.metric)
            groups.setdefault(group, Mean()).add(noise)
            members[group].append((before, after))
    for group, mean in groups.items():
        if len(members[group]) > 1:
            changes.append(_mean_change(group, members[group], mean.noise(confidence)))
            runs.append(members[group][0][1])
    asked = [at for at, change in enumerate(changes) if change.p_value is not None]
    corrected = bootstrap.holm([changes[at].p_value or 0.0 for at in asked])
    for at, p_value in zip(asked, corrected, strict=True):
        changes[at] = _judged(replace(changes[at], p_value=p_value), runs[at], confidence)
    return changes[: len(matched)], changes[len(matched) :]


def _noise(before: Run, after: Run, confidence: float, samples: int) -> Noise | None:
    """Bootstrap a run that is scored in both suites; None if that is impossible, or the metrics differ."""
    assert before.score is not None
    assert after.score is not None
    if (before.score.metric, before.score.split) != (after.score.metric, after.score.split):
        return None
    first, second = instance_sums(before), instance_sums(after)
    if first is None or second is None:
        return None
    is_exponential = after.score.metric == "perplexity"
    try:
        return bootstrap.compare_scores(
            first, second, name=after.name, confidence=confidence, samples=samples, is_exponential=is_exponential
        )
    except OverflowError:  # a perplexity too large for a float
        return None


def _change(before: Run, after: Run, noise: Noise | None) -> ScoreChange:
    """Return a run's change with its own p-value; the verdict follows later."""
    first, second = before.score, after.score
    assert first is not None
    assert second is not None
    change = ScoreChange(
        name=after.name,
        verdict="same",
        model=after.model,
        metric=second.metric,
        before=first.value,
        after=second.value,
        instances=second.num_instances,
    )
    if (first.metric, first.split) != (second.metric, second.split):
        reason = f"another metric or split: {first.metric} on {first.split} before"
        return replace(change, verdict="not compared", before=None, reason=reason)
    if noise is not None:
        return _with_noise(change, noise)
    assert first.value is not None
    assert second.value is not None
    in_unit = 0 <= first.value <= 1 and 0 <= second.value <= 1
    p_value = bootstrap.whole_score_p_value(
        second.value - first.value, first.num_instances if in_unit else 0, second.num_instances if in_unit else 0
    )
    return replace(change, p_value=p_value, how="whole")


def _mean_change(group: tuple[str, str], members: Sequence[tuple[Run, Run]], noise: Noise) -> ScoreChange:
    model, metric = group
    before, after = (
        sum(run.value for run in runs if run.value is not None) / len(members) for runs in zip(*members, strict=True)
    )
    change = ScoreChange(
        name=f"mean of {len(members)} runs of {model}",
        verdict="same",
        model=model,
        metric=metric,
        before=before,
        after=after,
        instances=sum(run.score.num_instances for _, run in members if run.score),
    )
    return _with_noise(change, noise)


def _with_noise(change: ScoreChange, noise: Noise) -> ScoreChange:
    how = "paired" if noise.is_paired else "unpaired"
    return replace(change, low=noise.low, high=noise.high, p_value=noise.p_value, how=how, changed=noise.num_changed)


def _judged(change: ScoreChange, run: Run, confidence: float) -> ScoreChange:
    """Return the change with its verdict."""
    assert change.p_value is not None
    assert change.before is not None
    assert change.after is not None
    if change.p_value >= 1 - confidence or bootstrap.is_rounding(change.before, change.after):
        return change
    is_worse = (change.after > change.before) == is_lower_better(run)
    return replace(change, verdict="worse" if is_worse else "better")
