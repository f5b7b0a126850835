"""The parts of a report's page about scores: the table, the trends, the drift from the reference."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen_helm.helm.scores import distinct_names, short_name
from flexgen_helm.reports import charts
from flexgen_helm.reports.charts import Point
from flexgen_helm.reports.data import ModelRow, Report, RunRow, TrendSuite
from flexgen_helm.reports.drift import Drift
from flexgen_helm.reports.markup import Markup, breakable, join, tag
from flexgen_helm.reports.words import NONE, change_class, number, plural, signed
from flexgen_helm.suites.comparison import ScoreChange


def scores_section(report: Report) -> Markup:
    """Each run's score with the previous suite's and the reference's, by model."""
    scored = [run for run in report.runs if run.score is not None]
    if not scored:
        return join([tag("h2", "Scores"), tag("p", "No run has a score yet.", class_="soft")])
    metrics = {run.metric for run in scored}
    names, shared = distinct_names([run.name for run in scored])
    has_previous = report.previous is not None
    has_reference = any(run.reference is not None for run in scored)
    has_trend = len(report.trend) > 1
    head = [tag("th", "Run", scope="col")]
    head += [tag("th", "Metric", scope="col", class_="left roomy")] if len(metrics) > 1 else []
    head += [tag("th", "Instances", scope="col", class_="roomy"), tag("th", "Score", scope="col")]
    if has_previous:
        head += [tag("th", "Before", scope="col", class_="roomy"), tag("th", "Change", scope="col")]
    if has_reference:
        head += [
            tag("th", "Reference", scope="col", class_="roomy"),
            tag("th", "To ref.", scope="col", title="Ours less the reference's"),
        ]
    head += [tag("th", "Trend", scope="col", class_="roomy" if has_reference else None)] if has_trend else []
    rows: list[Markup] = []
    for model in sorted({run.model for run in scored}):
        members = [run for run in scored if run.model == model]
        if len({run.model for run in scored}) > 1:
            rows.append(tag("tr", tag("th", model, colspan=len(head), class_="left"), class_="group"))
        for mean in report.comparison.means if report.comparison else ():
            if mean.model == model:
                rows.append(_mean_row(mean, members, len(metrics) > 1, has_reference, has_trend))
        rows += [_row(run, names[run.name], report, len(metrics) > 1, has_reference) for run in members]
    table = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows))
    told = [metrics.copy().pop() if len(metrics) == 1 else "each run's main metric"]
    told += [f"every run with {', '.join(shared)}"] if shared else []
    told += [f"before: {report.previous}"] if has_previous else ["no earlier suite to compare with"]
    told += [f"reference: {report.reference or 'plain transformers, by verify'}"] if has_reference else []
    return join([tag("h2", "Scores"), tag("p", "; ".join(told), class_="soft small"), tag("div", table, class_="wide")])


def _row(run: RunRow, name: str, report: Report, has_metric: bool, has_reference: bool) -> Markup:
    cells = [tag("th", breakable(name), scope="row", title=run.name)]
    cells += [tag("td", run.metric, class_="left soft roomy")] if has_metric else []
    cells += [tag("td", f"{run.instances:,}", class_="soft roomy"), tag("td", number(run.score))]
    if report.previous is not None:
        cells += [tag("td", number(run.previous), class_="soft roomy"), _change_cell(run.change)]
    if has_reference:
        cells.append(tag("td", number(run.reference), class_="soft roomy"))
        cells.append(tag("td", signed(run.reference_difference), class_="soft"))
    if len(report.trend) > 1:
        points = [
            Point(value=value, title=f"{suite.name}: {number(value)}", is_mark=run.name in suite.regressions)
            for value, suite in zip(run.trend, report.trend, strict=True)
        ]
        cells.append(tag("td", charts.sparkline(points), class_="trend roomy" if has_reference else "trend"))
    return tag("tr", *cells, class_=run.change.verdict if run.change else None)


def _mean_row(
    mean: ScoreChange, members: Sequence[RunRow], has_metric: bool, has_reference: bool, has_trend: bool
) -> Markup:
    cells = [tag("th", f"Mean of {mean.name.split(' of ')[1]}", scope="row", title=mean.name)]
    cells += [tag("td", mean.metric, class_="left roomy")] if has_metric else []
    cells += [tag("td", f"{mean.instances:,}", class_="roomy"), tag("td", number(mean.after))]
    cells += [tag("td", number(mean.before), class_="roomy"), _change_cell(mean)]
    if has_reference:
        pairs = [(run.reference, run.reference_difference) for run in members if run.metric == mean.metric]
        told = [(one, other) for one, other in pairs if one is not None and other is not None]
        means = (
            [sum(column) / len(told) for column in zip(*told, strict=True)] if len(told) == len(pairs) else [None] * 2
        )
        cells += [tag("td", number(means[0]), class_="roomy"), tag("td", signed(means[1]))]
    cells += [tag("td", class_="roomy" if has_reference else None)] if has_trend else []
    return tag("tr", *cells, class_=f"mean {mean.verdict}")


def _change_cell(change: ScoreChange | None) -> Markup:
    if change is None:
        return tag("td", NONE, class_="soft")
    if change.difference is None:
        return tag("td", change.verdict, class_=change_class(change), title=change.reason or None)
    hint = f"p = {change.p_value:.2g} after correction" if change.p_value is not None else change.reason
    if change.low is not None and change.high is not None:
        hint += f"; interval {signed(change.low)} to {signed(change.high)}"
    if change.how == "paired":
        hint += f"; {plural(change.changed, 'instance')} changed"
    arrow = {"worse": " ▼", "better": " ▲"}.get(change.verdict, "")
    return tag("td", f"{signed(change.difference)}{arrow}", class_=change_class(change), title=hint)


def trends_section(report: Report) -> Markup | None:
    """Mean scores and throughput over the last suites."""
    if len(report.trend) < 2:
        return None
    ends = (report.trend[0].name, report.trend[-1].name)
    cards = []
    groups = sorted({(run.model, run.metric) for run in report.runs if run.score is not None})
    for model, metric in groups:
        members = [run for run in report.runs if (run.model, run.metric) == (model, metric) and run.score is not None]
        points = _mean_points(members, report.trend)
        chart = charts.trend(points, ".3f", ends, from_zero=False, label=f"mean {metric} over the last suites")
        if chart is not None:
            what = f"mean {metric} of {plural(len(members), 'run')}" if len(members) > 1 else metric
            cards.append(tag("div", tag("h3", model), tag("p", what, class_="soft small"), chart, class_="card"))
    for row in report.models:
        chart = charts.trend(_speed_points(row, report.trend), ",.0f", ends, from_zero=True, label="tokens a second")
        if chart is not None:
            title = tag("h3", row.record.deployment)
            cards.append(tag("div", title, tag("p", "tokens a second", class_="soft small"), chart, class_="card"))
    legend = "▼ marks a regression against the suite before it; a hollow point is of other runs, work or hardware."
    heading = tag("h2", f"The last {len(report.trend)} suites")
    return join([heading, tag("p", legend, class_="soft small"), tag("div", *cards, class_="columns")])


def _mean_points(members: Sequence[RunRow], suites: Sequence[TrendSuite]) -> list[Point]:
    names = {run.name for run in members}
    points = []
    for at, suite in enumerate(suites):
        values = [value for run in members if (value := run.trend[at]) is not None]
        mean = sum(values) / len(values) if values else None
        worse = [name for name in suite.regressions if name in names or name.endswith(f" of {members[0].model}")]
        title = f"{suite.name}: {number(mean)}"
        title += f", {len(values)} of {plural(len(members), 'run')}" if len(values) < len(members) else ""
        title += f", {plural(len(worse), 'regression')}" if worse else ""
        points.append(Point(value=mean, title=title, is_mark=bool(worse), is_hollow=len(values) < len(members)))
    return points


def _speed_points(row: ModelRow, suites: Sequence[TrendSuite]) -> list[Point]:
    return [
        Point(
            value=point.tokens_per_second,
            title=f"{suite.name}: {point.tokens_per_second or 0:,.1f} tokens a second",
            is_mark=point.is_regression,
            is_hollow=not point.is_comparable,
        )
        for point, suite in zip(row.trend, suites, strict=True)
    ]


def drift_section(report: Report) -> Markup | None:
    """How far the engine is from plain transformers, if `verify` was run, and where compression requires it."""
    unknown = [row for row in report.models if row.compression and not any(each.compression for each in report.drift)]
    if not report.drift and not unknown:
        return None
    parts: list[Markup | None] = [tag("h2", "Drift from plain transformers")]
    for row in unknown:
        hint = "How far that moves results is not known here; flexgen-helm verify says it."
        hint = f"{row.record.deployment}: {row.compression}. {hint}"
        parts.append(tag("ul", tag("li", hint, class_="warn"), class_="notices"))
    if report.drift:
        names = ("Run", "Compression", "Verdict", "Largest", "Mean", "Limit", "Tokens alike", "Score", "Reference")
        roomy = ("Compression", "Mean", "Limit", "Score", "Reference")
        head = [tag("th", name, scope="col", class_="roomy" if name in roomy else None) for name in names]
        table = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *map(_drift_row, report.drift)))
        told = "differences of log-probabilities on a sample, by flexgen-helm verify; the limit is rounding's"
        parts += [tag("p", told, class_="soft small"), tag("div", table, class_="wide")]
    return join(parts)


def _drift_row(drift: Drift) -> Markup:
    told = [
        NONE if each is None else f"{each:.1e}"
        for each in (drift.largest_difference, drift.mean_difference, drift.tolerance)
    ]
    alike = f"{drift.agreeing_tokens} of {drift.compared_tokens}" if drift.compared_tokens else NONE
    return tag(
        "tr",
        tag("th", breakable(short_name(drift.run)), scope="row", title=drift.run),
        tag("td", drift.compression or "none", class_="roomy"),
        tag("td", drift.verdict, class_="warn" if drift.verdict == "drift" else "soft"),
        tag("td", told[0]),
        tag("td", told[1], class_="roomy"),
        tag("td", told[2], class_="soft roomy"),
        tag("td", alike),
        tag("td", number(drift.score), class_="roomy"),
        tag("td", number(drift.reference_score), class_="roomy"),
    )
