"""The part of a report's page about what models wrote: how long, how much of it cut off, and a few answers to read."""

from __future__ import annotations

from collections.abc import Sequence

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
        "tokens of answers; a bar stands for 0, 1, 2 to 3, 4 to 7 tokens, and so on. Cut off: ended for want of room "
        "(max_tokens or the window)"
    )
    if any(answers.thought for _, answers in rows):
        told += "; those that were cut off in their thinking are empty. Thinking is counted with its marks"
    parts = [tag("h2", "Answers"), tag("p", f"{told}.", class_="soft small"), _table(rows, names)]
    parts.append(tag("h3", "To read"))
    parts += [_readable(names[run.name], run, answers.samples) for run, answers in rows[:_MOST_READ]]
    if len(rows) > _MOST_READ:
        parts.append(tag("p", f"{plural(len(rows) - _MOST_READ, 'more run')}: see report.json.", class_="soft small"))
    return join(parts)


def _table(rows: Sequence[_Row], names: dict[str, str]) -> Markup:
    has_thinking = any(answers.thought for _, answers in rows)
    found = [answers.lengths for _, answers in rows] + [run.thinking for run, _ in rows if run.thinking]
    num_bins = max(len(each.bins) for each in found)
    heads = [("Run", ""), ("Answers", "roomy"), ("Median", ""), ("90 %", "roomy"), ("Longest", ""), ("", "trend roomy")]
    heads += [("Cut off", "")]
    if has_thinking:
        heads += [("Thinking", ""), ("90 %", "roomy"), ("Longest", ""), ("", "trend roomy"), ("Cut off there", "")]
    head = tag("tr", *(tag("th", name, scope="col", class_=kind or None) for name, kind in heads))
    body = (_row(run, answers, names[run.name], num_bins, has_thinking) for run, answers in rows)
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="wide")


def _row(run: RunRow, answers: Answers, name: str, num_bins: int, has_thinking: bool) -> Markup:
    texts = answers.lengths.texts
    cells = [tag("th", breakable(name), scope="row", title=run.name), tag("td", f"{texts:,}", class_="soft roomy")]
    cells += [*_cells(answers.lengths, num_bins, "decode"), _share(answers.cut_off, texts)]
    if has_thinking:
        unknown = f"{plural(answers.thought, 'answer')} with thinking, whose tokens are not recorded"
        cells += _cells(run.thinking, num_bins, "host", unknown if answers.thought else "")
        cells.append(_share(answers.cut_off_thinking if answers.thought else None, texts))
    return tag("tr", *cells)


def _cells(lengths: Lengths | None, num_bins: int, kind: str, hint: str = "") -> list[Markup]:
    if lengths is None:
        kinds = ("soft", "soft roomy", "soft", "trend roomy")
        first = tag("td", "not recorded" if hint else NONE, class_=kinds[0], title=hint or None)
        return [first, *(tag("td", class_=kind) for kind in kinds[1:])]
    return [
        tag("td", f"{lengths.median:,}", title=f"{lengths.tokens / lengths.texts:,.1f} in the mean"),
        tag("td", f"{lengths.ninth_decile:,}", class_="roomy"),
        tag("td", f"{lengths.longest:,}"),
        tag("td", charts.histogram(lengths.bins, num_bins, kind), class_="trend roomy"),
    ]


def _share(count: int | None, of: int) -> Markup:
    if count is None:
        return tag("td", NONE, class_="soft")
    told = f"{count:,} ({percent(count / of)})" if count else "0"
    return tag("td", told, class_="warn" if count else "soft")


def _readable(name: str, run: RunRow, samples: Sequence[Sample]) -> Markup:
    summary = tag("summary", breakable(name), f": {plural(len(samples), 'answer')}", title=run.name)
    return tag("details", summary, *map(_sample, samples), class_="card")


def _sample(sample: Sample) -> Markup:
    ended = f", ended by {sample.finish_reason}" if sample.finish_reason else ""
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
    return tag("details", tag("summary", f"Thinking, {plural(number, 'character')}"), tag("pre", _shown(thinking)))


def _shown(excerpt: Excerpt) -> str:
    left_out = excerpt.num_left_out
    return f"{excerpt.text} … ({plural(left_out, 'more character')})" if left_out else excerpt.text
