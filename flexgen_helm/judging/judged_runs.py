"""Changes a run spec so that a judge of ours judges it: the judge is in its name, its annotators and its metrics."""

from __future__ import annotations

from dataclasses import replace

from helm.benchmark.annotation.annotator import AnnotatorSpec
from helm.benchmark.metrics.metric import MetricSpec
from helm.benchmark.run_spec import RunSpec

from engine.errors import ConfigError
from flexgen_helm.judging.judge import Judge
from flexgen_helm.judging.kinds import asks_a_model, is_jury_metric, kind_of, needs_judge, scores_verdicts

_METRIC = "flexgen_helm.judging.verdict_metric.VerdictMetric"


def judged(run_spec: RunSpec, judge: Judge) -> RunSpec:
    """Return `run_spec` with the judge in place of the models that it names; unchanged if no model judges it.

    Its requests are the same. Raises `ConfigError` for an annotator that is not known.
    """
    if not needs_judge(run_spec):
        return run_spec
    name = run_spec.name
    return replace(
        run_spec,
        name=f"{name}{_suffix(judge)}",
        annotators=[_told(name, annotator, judge) for annotator in run_spec.annotators or ()],
        metric_specs=[
            *(_of_jury(metric, judge) if is_jury_metric(metric) else metric for metric in run_spec.metric_specs),
            MetricSpec(class_name=_METRIC, args={"judge": judge.name}),
        ],
    )


def without_judge(run_spec: RunSpec) -> RunSpec:
    """`run_spec` without the annotators that call a model for verdicts, and without the metrics of verdicts."""
    if not needs_judge(run_spec):
        return run_spec
    return replace(
        run_spec,
        annotators=[annotator for annotator in run_spec.annotators or () if not asks_a_model(annotator)],
        metric_specs=[metric for metric in run_spec.metric_specs if not scores_verdicts(metric)],
    )


def unjudged_name(name: str, judge: Judge) -> str:
    """The name that a run had before `judged`."""
    return name.removesuffix(_suffix(judge))


def judge_of(run_spec: RunSpec) -> str | None:
    """The name of the judge of a run of `judged`; None of another one."""
    return next((str(each.args["judge"]) for each in run_spec.metric_specs if each.class_name == _METRIC), None)


def _suffix(judge: Judge) -> str:
    return f",judge={judge.name}"  # by now a run's name has arguments, its model among them


def _told(run: str, annotator: AnnotatorSpec, judge: Judge) -> AnnotatorSpec:
    if not asks_a_model(annotator):
        return annotator
    kind = kind_of(annotator)
    if kind is None:
        name = annotator.class_name.rsplit(".", 1)[-1]
        raise ConfigError(
            f"{run}: --judge cannot replace the model of {name}, because it is not known what this annotator makes of "
            "an answer that it cannot read; leave the entry out, or judge it with helm-run"
        )
    return kind.tell(annotator, judge)


def _of_jury(metric: MetricSpec, judge: Judge) -> MetricSpec:
    return replace(metric, args={**metric.args, "annotator_models": {judge.name: judge.info}})
