"""A report as one self-contained HTML page: no script, no network, no other file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from flexgen_helm import __version__
from flexgen_helm.reports.answers import answers_section
from flexgen_helm.reports.data import Report
from flexgen_helm.reports.head import header, notices
from flexgen_helm.reports.markup import Markup, join, tag, text
from flexgen_helm.reports.models import models_section
from flexgen_helm.reports.tables import drift_section, scores_section, trends_section


def page(report: Report) -> str:
    """The whole page."""
    style = files("flexgen_helm.reports").joinpath("report.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{report.suite} · flexgen-helm"),
        tag("style", Markup(style)),
    )
    body = tag(
        "main",
        header(report),
        notices(report),
        trends_section(report),
        models_section(report),
        scores_section(report),
        answers_section(report),
        drift_section(report),
        _machine(report),
        _footer(report),
    )
    return f'<!DOCTYPE html>\n<html lang="en">\n{head}\n{tag("body", body)}\n</html>\n'


def _machine(report: Report) -> Markup | None:
    pairs: list[tuple[str, object]] = []
    if (hardware := report.hardware) is not None:
        memory = f", {hardware.device_memory_bytes / 1e9:.1f} GB" if hardware.device_memory_bytes else ""
        pairs += [
            ("Device", f"{hardware.device}{memory}"),
            ("Host", hardware.host),
            ("Cores", hardware.cores),
            ("Host memory", f"{hardware.host_memory_bytes / 1e9:.1f} GB"),
        ]
    pairs += list(report.versions.items())
    if report.commit:
        pairs.append(("commit", report.commit))
    return None if not pairs else join([tag("h2", "Machine and versions"), tag("div", pairs_of(pairs), class_="card")])


def pairs_of(pairs: Sequence[tuple[str, object]]) -> Markup:
    """Names above their values, in columns."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs), class_="pairs")


def _footer(report: Report) -> Markup:
    parts: list[object] = []
    if report.comparison is not None:
        comparison = report.comparison
        parts.append(
            f"Scores are compared with {report.previous}: a change counts where a bootstrap over instances says "
            f"so with {comparison.confidence:.0%} confidence for all {comparison.num_tests} scores together (Holm's "
            f"correction); a model is slower below {1 - comparison.slowdown:.0%} of its earlier tokens a second, on "
            "the same hardware with the same work. "
        )
    parts.append(f"Written by flexgen-helm {__version__}; the same as data: report.json.")
    return tag("footer", *map(text, parts))
