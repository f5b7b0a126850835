"""The top of a report's page: the suite, its main figures, and what needs attention."""

from __future__ import annotations

from datetime import UTC, datetime

from flexgen_helm.helm.scores import distinct_names
from flexgen_helm.reports.data import ModelRow, Report
from flexgen_helm.reports.markup import Markup, breakable, join, tag
from flexgen_helm.reports.words import change_class, clock, number, percent, plural, signed, signed_percent
from flexgen_helm.suites.comparison import ScoreChange

_STATUS = {
    "finished": ("finished", "pill"),
    "unfinished": ("not finished", "pill warn"),
    "unrecorded": ("no record of a sweep", "pill"),
}
_FAILURES = {"worse": "is worse", "missing": "is missing", "unscored": "has no score"}


def header(report: Report) -> Markup:
    """Name, date, state and main figures."""
    status, kind = _STATUS[report.status]
    pills = [tag("span", status, class_=kind)]
    if report.comparison is not None:
        failures = len(report.comparison.failures)
        words = f"{plural(failures, 'regression')} against" if failures else "nothing worse than in"
        pills.append(tag("span", f"{words} {report.previous}", class_=f"pill {'bad' if failures else 'good'}"))
    parts = [datetime.fromisoformat(report.started).astimezone(UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0")]
    if report.finished:
        took = (datetime.fromisoformat(report.finished) - datetime.fromisoformat(report.started)).total_seconds()
        parts.append(clock(took))
    models = sorted({run.model for run in report.runs if run.model})
    parts.append(", ".join(models) if len(models) < 4 else plural(len(models), "model"))
    if report.hardware is not None:
        parts.append(report.hardware.device)
    title = tag("div", tag("h1", breakable(report.suite)), *pills, class_="head")
    return join(
        [title, tag("p", " · ".join(filter(None, parts)), class_="soft"), tag("dl", *_tiles(report), class_="tiles")]
    )


def _tiles(report: Report) -> list[Markup]:
    done = sum(run.status in ("done", "skipped") for run in report.runs)
    failed = len(report.failed_runs)
    below = tag("span", f"{failed} without results", class_="bad") if failed else "all done"
    tiles = [_tile("Runs", f"{done} of {len(report.runs)}", below)]
    if report.comparison is not None and len(report.comparison.means) == 1:
        (mean,) = report.comparison.means
        change = tag("span", f"{signed(mean.difference)} from {number(mean.before)}", class_=change_class(mean))
        tiles.append(_tile(f"Mean {mean.metric}", number(mean.after), change))
    if report.models:
        requests, cached = (sum(getattr(row.record, name) for row in report.models) for name in ("requests", "cached"))
        tiles.append(_tile("Requests", f"{requests:,}", f"{cached:,} from the cache"))
    return [*tiles, *(_speed_tiles(report.models[0]) if len(report.models) == 1 else [])]


def _speed_tiles(row: ModelRow) -> list[Markup]:
    tiles = []
    if row.tokens_per_second is not None:
        below: Markup | str = "loading included"
        if row.verdict in ("same", "slower", "faster") and row.previous:
            kind = {"slower": "bad", "faster": "good"}.get(row.verdict)
            change = signed_percent(row.tokens_per_second / row.previous - 1)
            below = tag("span", f"{change} from {row.previous:,.0f}", class_=kind)
        tiles.append(_tile("Tokens a second", f"{row.tokens_per_second:,.0f}", below))
    if row.record.fraction is not None:
        least = "" if row.record.limit_s is None else f"{clock(row.record.limit_s)} at the least"
        tiles.append(_tile("Of the hardware's limit", percent(row.record.fraction), least))
    return tiles


def _tile(name: str, value: object, below: object) -> Markup:
    return tag("div", tag("dt", name), tag("dd", value, class_="big"), tag("dd", below, class_="small soft"))


def notices(report: Report) -> Markup | None:
    """Failed runs with their reasons, regressions, and other things that need attention; None if there is nothing."""
    names, _ = distinct_names([run.name for run in report.runs])
    if len({run.model for run in report.runs}) > 1:
        names = {run.name: f"{names[run.name]} of {run.model}" for run in report.runs}
    found: list[Markup] = []
    if report.status == "unfinished":
        hint = "it is still running, or was stopped; the same command continues where it stopped"
        found.append(_notice("This sweep", "has not finished", hint, "warn"))
    for run in report.failed_runs:
        verb = "failed" if run.status == "failed" else "has no results"
        found.append(_notice(names[run.name], verb, run.error or "", "bad", run.name))
    failed = {run.name for run in report.failed_runs}
    if report.comparison is not None:
        for change in (*report.comparison.means, *report.comparison.scores):
            if change.is_failure and change.name not in failed:
                shown = names.get(change.name, change.name)
                found.append(_notice(shown, _FAILURES.get(change.verdict, ""), _detail(change), "bad", change.name))
        for speed in report.comparison.speeds:
            if speed.is_failure:
                detail = f"{speed.before:,.0f} → {speed.after:,.0f} tokens a second ({signed_percent(speed.change)})"
                found.append(_notice(speed.name, "is slower", detail, "bad"))
    for run in report.runs:
        if run.failed_requests:
            what = f"has {plural(run.failed_requests, 'failed request')}"
            found.append(_notice(names[run.name], what, "counted as empty answers", "warn", run.name))
    return join([tag("h2", "To look at"), tag("ul", *found, class_="notices")]) if found else None


def _detail(change: ScoreChange) -> str:
    if change.difference is None:
        return change.reason
    return f"{change.metric} {number(change.before)} → {number(change.after)} ({signed(change.difference)})"


def _notice(name: str, what: str, detail: str, kind: str, title: str | None = None) -> Markup:
    return tag(
        "li", tag("strong", breakable(name), title=title), f" {what}", f": {detail}" if detail else "", class_=kind
    )
