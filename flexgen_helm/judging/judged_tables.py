"""HELM's tables of a suite judged by a model of ours: they name the judge and the fraction of readable verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from helm.benchmark.metrics.metric import MetricMetadata, create_metric
from helm.benchmark.presentation.schema import Field, MetricGroup, MetricNameMatcher, RunGroup, Schema
from helm.benchmark.presentation.summarize import Summarizer
from helm.benchmark.run_spec import RunSpec

from engine.errors import ConfigError
from flexgen_helm.judging.judged_runs import judge_of
from flexgen_helm.judging.kinds import scores_verdicts
from flexgen_helm.judging.verdict_metric import VerdictMetric

_GROUP = "verdicts"
_OF_API_JUDGES = frozenset({"safety_gpt_annotator_success", "safety_llama_annotator_success"})
"""Columns of HELM's schemas with the answer rates of the API models that it uses as judges."""


class JudgedSummarizer(Summarizer):
    """For `helm-summarize --summarizer-class-name`: HELM's own, with the judge in its schema."""

    def fix_up_schema(self) -> None:
        """See HELM's method; raises `ConfigError` where several models have judged."""
        super().fix_up_schema()
        self.schema = with_judge(self.schema, [run.run_spec for run in self.runs])


def with_judge(schema: Schema, run_specs: Sequence[RunSpec]) -> Schema:
    """`schema` for runs that one model of ours has judged; unchanged where none of them was.

    Columns of scores based on verdicts have the judge's name, judged benchmarks have a column for the share of verdicts
    that could be read, and the columns of HELM's own judges are left out. Raises `ConfigError` for runs that several
    models have judged, since HELM takes the mean of one row and column.
    """
    judged = [spec for spec in run_specs if any(map(scores_verdicts, spec.metric_specs))]
    judges = {judge_of(spec) for spec in judged}
    if judges <= {None}:
        return schema
    if len(judges) > 1:
        names = " and ".join(sorted(each or "the models that HELM asks" for each in judges))
        raise ConfigError(
            f"runs were judged by {names}, and HELM's tables would take the mean of their scores; summarize suites of "
            "one judge"
        )
    (judge,) = judges
    assert judge is not None
    scores = {each.name for spec in judged for each in _metadata(spec)}
    mains = {group.environment.get("main_name") for group in schema.run_groups}
    metrics = [_by(field, judge, field.name in mains) if field.name in scores else field for field in schema.metrics]
    (verdicts,) = VerdictMetric(judge).get_metadata()
    if verdicts.name not in schema.name_to_metric:
        field = Field(
            name=verdicts.name,
            display_name=verdicts.display_name,
            short_display_name=verdicts.short_display_name,
            description=verdicts.description,
            lower_is_better=False,
        )
        metrics.append(field)
    kept = [each for each in map(_without_api_judges, schema.metric_groups) if each.metrics]
    matcher = MetricNameMatcher(name=verdicts.name, split="${main_split}")
    kept.append(MetricGroup(name=_GROUP, display_name="Verdicts", hide_win_rates=True, metrics=[matcher]))
    left_out = schema.name_to_metric_group.keys() - {each.name for each in kept}
    groups = [
        replace(each, metric_groups=[n for n in each.metric_groups if n not in left_out]) for each in schema.run_groups
    ]
    of_judged = {name for spec in judged for name in spec.groups}
    return replace(
        schema,
        metrics=metrics,
        metric_groups=kept,
        run_groups=[_judged(each, judge) if of_judged & {each.name, *each.subgroups} else each for each in groups],
    )


def _metadata(spec: RunSpec) -> list[MetricMetadata]:
    return [
        each for metric in filter(scores_verdicts, spec.metric_specs) for each in create_metric(metric).get_metadata()
    ]


def _by(field: Field, judge: str, is_main: bool) -> Field:
    description = (
        f"Judged by {judge} in place of the models that HELM names; answers without a readable verdict "
        "are left out. Not comparable with published scores."
    )
    name = f"{field.get_short_display_name()} by {judge}" if is_main else field.short_display_name
    return replace(field, description=description, short_display_name=name)


def _without_api_judges(group: MetricGroup) -> MetricGroup:
    return replace(group, metrics=[each for each in group.metrics if each.name not in _OF_API_JUDGES])


def _judged(group: RunGroup, judge: str) -> RunGroup:
    """A benchmark that was judged, or a group of such: `helm-server` cuts headings short, but not descriptions."""
    names = group.metric_groups if group.subgroups else [*group.metric_groups, _GROUP]
    return replace(group, metric_groups=names, description=f"{group.description or ''} (judged by {judge})".lstrip())
