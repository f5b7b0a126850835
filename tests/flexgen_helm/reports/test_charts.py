"""Protects: charts show the numbers they are given, and markup escapes everything else."""

from __future__ import annotations

import re

import pytest
from html_page import Page
from hypothesis import assume, given
from hypothesis import strategies as st

from flexgen_helm.reports import charts
from flexgen_helm.reports.charts import Point
from flexgen_helm.reports.markup import Markup, breakable, join, tag, text
from flexgen_helm.sweeps.record import TimelinePoint

WIDTH, HEIGHT = 1000, 100


def paths(drawing: Markup | None, kind: str) -> list[str]:
    assert drawing is not None
    return [attrs["d"] for attrs in Page(drawing).all("path", kind)]


def corners(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_a_scale_holds_its_values_in_few_round_steps(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assume(high - low > 1e-9 * max(abs(low), abs(high)) or high == low)
    first, last, steps = charts.scale(low, high)
    slack = 1e-6 * (last - first)
    assert first <= low + slack
    assert high <= last + slack
    assert 2 <= len(steps) <= 6
    width = steps[1] - steps[0]
    digits = f"{width:.3e}".partition("e")[0]
    assert float(digits) in (1.0, 2.0, 5.0)


def test_a_trend_is_where_its_numbers_are() -> None:
    points = [Point(value=value, title=f"night {value}") for value in (0.0, 20.0, 40.0)]
    chart = charts.trend(points, ".0f", ("first", "last"), from_zero=True, label="tokens a second")
    (line,) = paths(chart, "line")
    _, high, steps = charts.scale(0.0, 40.0)
    assert [round(high * (1 - y / HEIGHT), 1) for _, y in corners(line)] == [0.0, 20.0, 40.0]
    xs = [x for x, _ in corners(line)]
    assert xs[1] - xs[0] == xs[2] - xs[1]
    assert chart is not None
    shown = Page(chart).text
    assert all(f"{step:.0f}" in shown for step in steps)
    assert "night 20.0" in shown
    assert shown.endswith("firstlast")


def test_a_trend_has_gaps_marks_and_hollow_points() -> None:
    points = [
        Point(value=1.0, title="a"),
        Point(value=None, title="b"),
        Point(value=0.5, title="c", is_mark=True),
        Point(value=0.6, title="d", is_hollow=True),
    ]
    chart = charts.trend(points, ".1f", ("", ""), from_zero=False, label="")
    (line,) = paths(chart, "line")
    assert line.count("M") == 2
    assert len(paths(chart, "dot")) == 4  # the hollow one is a dot in a dot
    assert len(paths(chart, "bad")) == 1
    assert len(paths(chart, "hollow")) == 1
    assert chart is not None
    assert Page(chart).text.count("▼") == 1


def test_nothing_to_draw_draws_nothing() -> None:
    nothing = [Point(value=None, title="")]
    assert charts.trend(nothing, ".1f", ("", ""), from_zero=False, label="") is None
    assert charts.sparkline([Point(value=1.0, title=""), *nothing]) is None
    assert charts.timeline([]) is None
    assert charts.timeline([TimelinePoint(at=0, seconds=0, prefill_rows=1, decode_rows=1, sequences=1)]) is None
    assert charts.shares([("load", 0.0), ("host", 0.0)]) is None


def test_a_line_that_hardly_changes_looks_flat() -> None:
    points = [Point(value=value, title="") for value in (0.500, 0.505, 0.500)]
    (line,) = paths(charts.sparkline(points), "line")
    heights = [y for _, y in corners(line)]
    assert max(heights) - min(heights) < HEIGHT / 10


@given(
    st.lists(
        st.tuples(st.floats(0.1, 5), st.integers(0, 10_000), st.integers(0, 500), st.integers(0, 200)),
        min_size=1,
        max_size=20,
    )
)
def test_the_areas_of_a_timeline_are_its_rows(sweeps: list[tuple[float, int, int, int]]) -> None:
    points, at = [], 0.0
    for seconds, prefill, decode, sequences in sweeps:
        points.append(
            TimelinePoint(at=at, seconds=seconds, prefill_rows=prefill, decode_rows=decode, sequences=sequences)
        )
        at += seconds
    chart = charts.timeline(points)
    high = charts.scale(0.0, max((p.prefill_rows + p.decode_rows) / p.seconds for p in points) or 1.0)[1]
    for kind, rows in (("prefill", [p.prefill_rows for p in points]), ("decode", [p.decode_rows for p in points])):
        (path,) = paths(chart, kind)
        area = sum(
            (float(right) - float(left)) * (float(floor) - float(top))
            for left, floor, top, right in re.findall(r"M([\d.]+) ([\d.]+)V([\d.]+)H([\d.]+)V", path)
        )
        assert area / WIDTH / HEIGHT * at * high == pytest.approx(sum(rows), rel=0.02, abs=0.002 * at * high)


def test_shares_are_as_wide_as_they_are() -> None:
    bar = charts.shares([("load", 1.0), ("prefill", 2.0), ("decode", 0.0), ("host", 1.0)])
    assert bar is not None
    found = [(attrs["class"], float(attrs["x"]), float(attrs["width"])) for attrs in Page(bar).all("rect")]
    assert found == [
        ("area load", 0, 250),
        ("area prefill", 250, 500),
        ("area decode", 750, 0),
        ("area host", 750, 250),
    ]
    assert Page(bar).all("svg")[0]["aria-label"] == "load 25%, prefill 50%, decode 0%, host 25%"


@given(st.text())
def test_all_text_is_escaped(content: str) -> None:
    page = Page(tag("p", content, title=content) + tag("b", breakable(content)))
    assert [name for name, _ in page.tags if name != "wbr"] == ["p", "b"]
    (attributes,) = page.all("p")
    shown = content.encode("utf-8", "replace").decode()
    if not re.search("[\x00-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]", shown):
        assert attributes["title"] == content
        assert page.text == content * 2


def test_markup_is_kept_and_nothing_else() -> None:
    assert join([tag("i", "<"), None, "&", 3]) == "<i>&lt;</i>&amp;3"
    assert text(Markup("<b>")) == "<b>"
    assert tag("td", class_="a", aria_label='"', title=None) == '<td class="a" aria-label="&quot;"></td>'
    assert text("a\x00b\ud800") == "a�b�"
