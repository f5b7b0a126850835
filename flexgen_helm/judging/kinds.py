"""HELM's annotators that call a model: how to give each another model, and how each reads its answers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from helm.benchmark.annotation.annotator import AnnotatorSpec
from helm.benchmark.metrics.metric import MetricSpec
from helm.benchmark.run_spec import RunSpec
from helm.common.object_spec import get_class_by_name

from flexgen_helm.judging.judge import Judge

API_NAME = "gpt"
"""The name that annotators with a built-in model use for it."""

Annotation = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """Annotators that read verdicts in the same way."""

    tell: Callable[[AnnotatorSpec, Judge], AnnotatorSpec]
    """Sets the judge in the annotator's spec, if that is possible."""
    has_verdict: Callable[[Annotation, str], bool]
    """Whether an annotation made from the judge's answer, with keys of the judge's name, has the value that HELM
    scores.
    """
    ends_with_score: bool = False
    """Whether an answer that is cut off may end within its score, and would be read as another score."""


def kind_of(annotator: AnnotatorSpec) -> Kind | None:
    """How an annotator reads verdicts; None if that is not known."""
    from helm.benchmark.annotation.model_as_judge import LLMAsJuryAnnotator

    name = annotator.class_name.rsplit(".", 1)[-1]
    if name in _KINDS:
        return _KINDS[name]
    return _JURY if issubclass(get_class_by_name(annotator.class_name), LLMAsJuryAnnotator) else None


def asks_a_model(annotator: AnnotatorSpec) -> bool:
    """Whether an annotator gets HELM's client of models; others compute their annotations themselves.

    One that cannot be imported calls none: `find_problems` reports what its run lacks.
    """
    try:
        made = get_class_by_name(annotator.class_name)
    except Exception:  # its module may raise anything
        return False
    return "auto_client" in inspect.signature(made.__init__).parameters


def needs_judge(run_spec: RunSpec) -> bool:
    """Whether a run's answers are judged by a model."""
    return any(asks_a_model(annotator) for annotator in run_spec.annotators or ())


def scores_verdicts(metric: MetricSpec) -> bool:
    """Whether a metric is computed from verdicts, so that an answer without one has no value."""
    return metric.class_name.rsplit(".", 1)[-1] in _METRICS


_JURY_METRIC = "LLMJuryMetric"
_METRICS = {"AIRBench2024ScoreMetric", "OmniMATHMetric", "SafetyScoreMetric", "WildBenchScoreMetric", _JURY_METRIC}


def is_jury_metric(metric: MetricSpec) -> bool:
    """Whether a metric has an argument with the names of the jury's verdicts."""
    return metric.class_name.rsplit(".", 1)[-1] == _JURY_METRIC


def _by_name(key: str) -> Kind:
    """An annotator with a built-in model."""
    return Kind(tell=lambda spec, judge: spec, has_verdict=lambda found, judge: _is_score(found.get(f"{judge}_{key}")))


def _tell_air_bench(spec: AnnotatorSpec, judge: Judge) -> AnnotatorSpec:
    return replace(spec, args={**spec.args, "model": judge.model, "model_deployment": judge.deployment})


def _tell_jury(spec: AnnotatorSpec, judge: Judge) -> AnnotatorSpec:
    return replace(spec, args={**spec.args, "annotator_models": {judge.name: judge.info}})


def _jury_has_verdict(found: Annotation, judge: str) -> bool:
    """Whether each criterion has a score that HELM's metric can read."""
    try:
        scores = [int(criterion["score"]) for criterion in found[judge].values()]
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return False
    return bool(scores)


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


_JURY = Kind(tell=_tell_jury, has_verdict=_jury_has_verdict)
_SCORE = _by_name("score")
_KINDS = {
    "AIRBench2024Annotator": Kind(
        tell=_tell_air_bench,
        has_verdict=lambda found, _: _is_score(found.get("score")),
        ends_with_score=True,
    ),
    "AnthropicRedTeamAnnotator": _SCORE,
    "HarmBenchAnnotator": _SCORE,
    "OmniMATHAnnotator": _by_name("equivalence_judgement"),
    "SimpleSafetyTestsAnnotator": _SCORE,
    "WildBenchAnnotator": _SCORE,
    "XSTestAnnotator": _SCORE,
}
