"""The part of a report's page about what models wrote: how long, how much of it cut off, and a few answers to read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flexgen_helm.helm.scores import distinct_names
from flexgen_helm.reports import charts
from flexgen_helm.reports.data import Report, RunRow
from flexgen_helm.reports.markup import Markup, breakable, join, tag
from flexgen_helm.reports.words import NONE, percent, plural
from flexgen_helm.suites.answers import Answers, Excerpt, Sample
from flexgen_helm.sweeps.record import Lengths

_MOST_READ = 20
"""Runs whose answers are shown; report.json has those of all."""
_Row = tuple[RunRow, Answers]


def answers_section(report: Report) -> Markup | None:
    """Lengths of answers and of thinking, by run; None where no run has answers of more than a few words."""
    rows = [(run, run.answers) for run in report.runs if run.answers is not None]
    if not rows:
        return None
    names, _ = distinct_names([run.name for run, _ in rows])
    if len({run.model for run, _ in rows}) > 1:
        names = {run.name: f"{names[run.name]} of {run.model}" for run, _ in rows}
    told = (
        "tokens of answers; a bar stands for 0, 1, 2 to 3, 4 to 7 tokens, and so on. Cut off: ended for want of room, "
        "by max_tokens or the window"
    )
    parts: list[Markup | None] = [tag("h2", "Answers"), tag("p", told, class_="soft small")]
    parts.append(_table((names[run.name], run, each.lengths, each.lengths.texts, each.cut_off) for run, each in rows))
    parts.append(_thinking_table([row for row in rows if row[1].thought], names))
    parts.append(tag("h3", "To read"))
    parts += [_readable(names[run.name], run, answers.samples) for run, answers in rows[:_MOST_READ]]
    if len(rows) > _MOST_READ:
        parts.append(tag("p", f"{plural(len(rows) - _MOST_READ, 'more run')}: see report.json", class_="soft small"))
    return join(parts)


def _thinking_table(rows: Sequence[_Row], names: dict[str, str]) -> Markup | None:
    if not rows:
        return None
    told = "tokens of thinking, marks included, before answers. Cut off: answers that are empty, since it had not ended"
    table = _table((names[run.name], run, run.thinking, each.thought, each.cut_off_thinking) for run, each in rows)
    return join([tag("h3", "Thinking"), tag("p", told, class_="soft small"), table])


def _table(rows: Iterable[tuple[str, RunRow, Lengths | None, int, int | None]]) -> Markup:
    """Each run's name, lengths, number of texts and how many were cut off."""
    rows = list(rows)
    num_bins = max((len(lengths.bins) for _, _, lengths, _, _ in rows if lengths), default=1)
    heads = [("Run", ""), ("Number", "roomy"), ("Mean", "roomy"), ("Median", ""), ("9 of 10", "roomy"), ("Longest", "")]
    heads += [("", "trend roomy"), ("Cut off", "")]
    head = tag("tr", *(tag("th", name, scope="col", class_=kind or None) for name, kind in heads))
    body = [
        tag(
            "tr",
            tag("th", breakable(name), scope="row", title=run.name),
            tag("td", f"{number:,}", class_="soft roomy"),
            *(_cells(lengths, num_bins)),
            _share(cut_off, number),
        )
        for name, run, lengths, number, cut_off in rows
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="wide")


def _cells(lengths: Lengths | None, num_bins: int) -> list[Markup]:
    if lengths is None:
        kinds = ("soft roomy", "soft", "soft roomy", "soft")
        return [*(tag("td", NONE, class_=kind) for kind in kinds), tag("td", "not recorded", class_="trend soft roomy")]
    return [
        tag("td", f"{lengths.tokens / lengths.texts:,.1f}", class_="soft roomy"),
        tag("td", f"{lengths.median:,}"),
        tag("td", f"{lengths.ninth_decile:,}", class_="roomy"),
        tag("td", f"{lengths.longest:,}"),
        tag("td", charts.histogram(lengths.bins, num_bins), class_="trend roomy"),
    ]


def _share(count: int | None, of: int) -> Markup:
    if count is None:
        return tag("td", NONE, class_="soft")
    told = f"{count:,} ({percent(count / of)})" if count else "0"
    return tag("td", told, class_="warn" if count else "soft")


def _readable(name: str, run: RunRow, samples: Sequence[Sample]) -> Markup:
    summary = tag("summary", breakable(name), f": {plural(len(samples), 'answer')}", title=run.name)
    return tag("details", summary, *map(_sample, samples), class_="card read")


def _sample(sample: Sample) -> Markup:
    ended = f", finish reason {sample.finish_reason}" if sample.finish_reason else ""
    heading = f"{sample.why.capitalize()}: instance {sample.instance}, {plural(sample.tokens, 'token')}{ended}"
    return join(
        [
            tag("h4", heading),
            tag("pre", _shown(sample.asked), class_="soft asked"),
            _thinking(sample.thinking),
            tag("pre", _shown(sample.answer), class_="answer")
            if sample.answer.text
            else tag("p", "The answer is empty.", class_="soft small"),
        ]
    )


def _thinking(thinking: Excerpt | None) -> Markup | None:
    if thinking is None:
        return None
    number = len(thinking.text) + thinking.num_left_out
    summary = tag("summary", f"Thinking, {plural(number, 'character')}")
    return tag("details", summary, tag("pre", _shown(thinking), class_="soft"))


def _shown(excerpt: Excerpt) -> str:
    left_out = excerpt.num_left_out
    return f"{excerpt.text} … ({plural(left_out, 'more character')})" if left_out else excerpt.text
