"""The part of a report's page about models: speed, where the time went, the sweeps, the policy."""

from __future__ import annotations

import json
from dataclasses import astuple, fields

from flexgen_helm.reports import charts
from flexgen_helm.reports.data import ModelRow, Report
from flexgen_helm.reports.markup import Markup, join, tag
from flexgen_helm.reports.words import NONE, clock, percent, plural, signed_percent

_DEVICE_COLUMNS = ("Device", "Computing", "Waiting for the link", "Waiting for HELM", "Passes")


def models_section(report: Report) -> Markup | None:
    """A card for each model; None for a suite without a record of its sweep."""
    if not report.models:
        return None
    writing = {run.deployment for run in report.runs if run.answers is not None}
    cards = (_card(row, is_writing=row.record.deployment in writing) for row in report.models)
    return join([tag("h2", "Speed"), *cards, _judge(report)])


def _judge(report: Report) -> Markup | None:
    """The judge, and the verdicts that could not be read."""
    if report.judge is None:
        return None
    lines = [tag("li", line, class_="warn") for line in report.verdicts]
    told = tag("ul", *lines, class_="notices") if lines else None
    return join([tag("h2", "Judge"), told, _card(report.judge, is_writing=True)])


def _card(row: ModelRow, *, is_writing: bool) -> Markup:
    record = row.record
    share = record.prefix_tokens_saved / record.prompt_tokens if record.prompt_tokens else None
    pairs = [
        ("Time, loading included", clock(record.seconds)),
        ("Tokens a second", NONE if row.tokens_per_second is None else f"{row.tokens_per_second:,.1f}"),
        ("Before", _before(row)),
        ("Requests", f"{record.requests:,}"),
        ("Computed", f"{record.computed:,}"),
        ("From the cache", f"{record.cached:,}"),
        ("Prompt tokens", f"{record.prompt_tokens:,}"),
        ("Saved by sharing", f"{record.prefix_tokens_saved:,}" + (f" ({share:.0%})" if share is not None else "")),
        ("New tokens", f"{record.new_tokens:,}"),
        ("Passes over the weights", f"{record.sweeps:,}"),
    ]
    return tag(
        "div",
        tag("h3", record.deployment),
        tag("p", row.compression, class_="soft small") if row.compression else None,
        tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs), class_="pairs"),
        tag("p", f"The engine's process ended and was replaced: {'; '.join(record.deaths)}", class_="small")
        if record.deaths
        else None,
        _limit(row),
        _time_split(row),
        _devices(row),
        _timeline(row),
        _rates(row) if is_writing else None,
        _mapping("Policy", record.policy or {"policy": "auto"}, is_open=True),
        _mapping("Plan", record.plan, is_open=False),
        class_="card",
    )


def _before(row: ModelRow) -> Markup | str:
    if not row.verdict:
        return NONE
    if row.verdict == "not compared" or row.previous is None or row.tokens_per_second is None:
        return tag("span", f"not compared: {row.reason}", class_="soft small")
    kind = {"slower": "bad", "faster": "good"}.get(row.verdict)
    change = tag("span", signed_percent(row.tokens_per_second / row.previous - 1), class_=kind)
    return join([f"{row.previous:,.1f}, ", change, f"; {row.reason}" if row.reason else ""])


def _limit(row: ModelRow) -> Markup | None:
    record = row.record
    if record.fraction is None:
        return None
    least = f" ({clock(record.limit_s)} at the least)" if record.limit_s is not None else ""
    return join(
        [tag("h4", f"{percent(record.fraction)} of the hardware's limit{least}"), charts.meter(record.fraction)]
    )


def _time_split(row: ModelRow) -> Markup | None:
    split = row.record.time_split
    parts = [(field.name, float(value)) for field, value in zip(fields(split), astuple(split), strict=True)]
    bar = charts.shares(parts)
    if bar is None:
        return None
    total = sum(value for _, value in parts)
    keys = [
        tag("li", tag("span", class_=f"key {name}"), f"{name} {clock(value)}, {value / total:.0%}")
        for name, value in parts
    ]
    return join([tag("h4", "Where the time went"), bar, tag("ul", *keys, class_="keys")])


def _devices(row: ModelRow) -> Markup | None:
    """For each device, how long it computed and what it waited for."""
    if not row.record.devices:
        return None
    head = tag("tr", *(tag("th", name, scope="col") for name in _DEVICE_COLUMNS))
    rows = [
        tag(
            "tr",
            tag("th", each.device, scope="row"),
            *(tag("td", clock(seconds)) for seconds in (each.computing, each.link, each.helm)),
            tag("td", f"{each.sweeps:,}"),
        )
        for each in row.record.devices
    ]
    lost = [f"{each.device} was given up: {each.given_up}" for each in row.record.devices if each.given_up]
    return join(
        [
            tag("h4", "Devices, after the weights were in place"),
            tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="wide"),
            *(tag("p", line, class_="small") for line in lost),
        ]
    )


def _timeline(row: ModelRow) -> Markup | None:
    chart = charts.timeline(row.record.timeline)
    if chart is None:
        return None
    keys = [
        tag("li", tag("span", class_="key prefill"), "prefill"),
        tag("li", tag("span", class_="key decode"), "decode"),
        tag("li", tag("span", class_="key line-key"), "active sequences, below"),
    ]
    title = f"Rows computed a second, over {plural(row.record.sweeps, 'pass')}"
    return join([tag("h4", title), tag("ul", *keys, class_="keys"), chart])


def _rates(row: ModelRow) -> Markup | None:
    chart = charts.rates(row.record.timeline)
    return None if chart is None else join([tag("h4", "New tokens a second"), chart])


def _mapping(name: str, content: object, *, is_open: bool) -> Markup | None:
    if not content:
        return None
    lines = content.items() if isinstance(content, dict) else [(name, content)]
    told = "   ".join(f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in lines)
    return tag("details", tag("summary", name), tag("pre", told), open="" if is_open else None)
