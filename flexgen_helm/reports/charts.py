"""Charts as inline SVG: they stretch with the page, and their words are HTML, so that they stay legible when narrow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flexgen_helm.reports.markup import Markup, join, tag
from flexgen_helm.sweeps.record import TimelinePoint

_WIDTH, _HEIGHT = 1000, 100
"""The drawing's own coordinates, which are stretched to the size of a chart."""


_MOST_STEPS = 100
"""The most steps of a line over time, each of which is a mean."""
_LEAST_SPREAD, _LEAST_RANGE = 0.2, 0.04
"""The least range of a sparkline and of a trend, relative to the values, so that small changes look small."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of a line."""

    value: float | None
    title: str
    """Shown when it is pointed at."""
    is_mark: bool = False
    """A regression."""
    is_hollow: bool = False
    """Not to be compared with the others."""


def sparkline(points: Sequence[Point]) -> Markup | None:
    """A line without axes, the last point and the regressions marked; None for fewer than two values."""
    values = [point.value for point in points if point.value is not None]
    if len(values) < 2:
        return None
    low, high = min(values), max(values)
    spread = max(high - low, _LEAST_SPREAD * max(abs(low), abs(high))) or 1.0
    places = _places(points, (low + high - spread) / 2, (low + high + spread) / 2, margin=16)
    shapes = [_line(places, "line"), _dot(places[-1], "dot", points[-1].title)]
    shapes += [
        _dot(place, "dot bad", point.title) for place, point in zip(places, points, strict=True) if point.is_mark
    ]
    told = f"from {values[0]:.3g} to {values[-1]:.3g}, between {low:.3g} and {high:.3g}"
    return _drawing(shapes, "spark", told)


def trend(points: Sequence[Point], form: str, ends: tuple[str, str], *, from_zero: bool, label: str) -> Markup | None:
    """A line over the suites with a vertical scale; `form` writes its numbers. None where there is no value."""
    values = [point.value for point in points if point.value is not None]
    if not values:
        return None
    low, high = min(values), max(values)
    missing = max(0.0, _LEAST_RANGE * max(abs(low), abs(high)) - (high - low)) / 2
    low, high, steps = scale(0.0, high) if from_zero else scale(low - missing, high + missing)
    places = _places(points, low, high)
    shapes: list[Markup | None] = [_grid(steps, low, high), _line(places, "line")]
    marks = []
    for place, point in zip(places, points, strict=True):
        if place is not None:
            shapes.append(_dot(place, "dot bad" if point.is_mark else "dot", point.title))
            if point.is_hollow and not point.is_mark:
                shapes.append(_dot(place, "dot hollow", point.title))
            if point.is_mark:
                left, top = place[0] / _WIDTH, place[1] / _HEIGHT
                marks.append(tag("i", "▼", class_="mark", style=f"left:{left:.2%};top:{top:.2%}"))
    return _figure(
        shapes, marks, [(format(step, form), 1 - (step - low) / (high - low)) for step in steps], ends, label
    )


def timeline(points: Sequence[TimelinePoint]) -> Markup | None:
    """Rows computed in each second, prefill below decode, over the time of a model; None where there is nothing."""
    points = [point for point in points if point.seconds > 0]
    if not points:
        return None
    end = max(point.at + point.seconds for point in points)
    rates = [(point.prefill_rows / point.seconds, point.decode_rows / point.seconds) for point in points]
    _, high, steps = scale(0.0, max(sum(rate) for rate in rates) or 1.0)
    shapes = [_grid(steps, 0.0, high)]
    for which, name in ((0, "prefill"), (1, "decode")):
        outline = []
        for point, rate in zip(points, rates, strict=True):
            left, right = (_WIDTH * at / end for at in (point.at, point.at + point.seconds))
            floor, top = (_HEIGHT * (1 - value / high) for value in (rate[0] * which, sum(rate[: which + 1])))
            if top < floor:
                outline.append(f"M{left:.1f} {floor:.2f}V{top:.2f}H{right:.1f}V{floor:.2f}Z")
        shapes.append(tag("path", d="".join(outline), class_=f"area {name}"))
    most = max(point.sequences for point in points) or 1
    steps_up = "".join(
        f"{'L' if at else 'M'}{_WIDTH * point.at / end:.1f} {_HEIGHT * (1 - point.sequences / most):.2f}"
        f"H{_WIDTH * (point.at + point.seconds) / end:.1f}"
        for at, point in enumerate(points)
    )
    lower = _figure(
        [tag("path", d=steps_up, class_="line plain")],
        [],
        [(str(most), 0.0), ("0", 1.0)],
        ("0 s", f"{end:.3g} s"),
        f"sequences that are active, at most {most}",
        low=True,
    )
    ticks = [(_short(step), 1 - step / high) for step in steps]
    upper = _figure(shapes, [], ticks, None, "rows computed in each second over the time of the model")
    return join([upper, lower])


def rates(points: Sequence[TimelinePoint]) -> Markup | None:
    """New tokens in each second over the time of a model, of all its devices; None where they are not known."""
    told = [(point, point.new_tokens) for point in points if point.seconds > 0 and point.new_tokens is not None]
    if not any(tokens for _, tokens in told):
        return None
    end = max(point.at + point.seconds for point, _ in told)
    width = end / _MOST_STEPS
    found = [0.0] * _MOST_STEPS
    for point, tokens in told:
        until = point.at + point.seconds
        for step in range(int(point.at / width), min(_MOST_STEPS, int(until / width) + 1)):
            inside = min(until, (step + 1) * width) - max(point.at, step * width)
            found[step] += tokens * max(0.0, inside) / point.seconds / width
    _, high, steps = scale(0.0, max(found))
    tops = "".join(f"V{_HEIGHT * (1 - rate / high):.2f}h{_WIDTH / _MOST_STEPS:.2f}" for rate in found)
    shapes = [_grid(steps, 0.0, high), tag("path", d=f"M0 {_HEIGHT}{tops}V{_HEIGHT}Z", class_="area decode")]
    ticks = [(_short(step), 1 - step / high) for step in steps]
    return _figure(shapes, [], ticks, ("0 s", f"{end:.3g} s"), "new tokens in each second over the time of the model")


def histogram(bins: Sequence[int], num_bins: int) -> Markup:
    """A small bar for each bin of `Lengths`, with room for `num_bins`."""
    highest, width = max(bins), _WIDTH / num_bins
    shapes, told = [], []
    for place, count in enumerate(bins):
        if count:
            first, last = (2**place) // 2, 2**place - 1
            told.append(f"{count} of {first}" + (f" to {last}" if last > first else "") + " tokens")
            height = max(6.0, _HEIGHT * count / highest)  # to be seen
            left, top = f"{place * width + 4:.1f}", f"{_HEIGHT - height:.1f}"
            size = {"width": f"{width - 8:.1f}", "height": f"{height:.1f}"}
            shapes.append(tag("rect", tag("title", told[-1]), x=left, y=top, **size, class_="area decode"))
    return _drawing(shapes, "spark", "; ".join(told))


def shares(parts: Sequence[tuple[str, float]]) -> Markup | None:
    """A bar cut into named shares of a sum; None where the sum is nothing. Names are the classes of the colours."""
    total = math.fsum(value for _, value in parts)
    if total <= 0:
        return None
    pieces, start = [], 0.0
    for name, value in parts:
        width = _WIDTH * value / total
        pieces.append(tag("rect", x=f"{start:.1f}", y=0, width=f"{width:.1f}", height=_HEIGHT, class_=f"area {name}"))
        start += width
    return _drawing(pieces, "shares", ", ".join(f"{name} {value / total:.0%}" for name, value in parts))


def meter(share: float) -> Markup:
    """A bar filled up to a share."""
    width = _WIDTH * min(1.0, max(0.0, share))
    back = tag("rect", x=0, y=0, width=_WIDTH, height=_HEIGHT, class_="area back")
    return _drawing(
        [back, tag("rect", x=0, y=0, width=f"{width:.1f}", height=_HEIGHT, class_="area full")], "meter", f"{share:.0%}"
    )


_NOTHING = 1e-300
"""Values no farther apart are drawn as one: what a step between them is divided by must not be nought."""


def scale(low: float, high: float) -> tuple[float, float, list[float]]:
    """Round ends of a scale that holds both values, and its steps: three to six."""
    if high - low <= max(_NOTHING, 1e-12 * max(abs(high), abs(low))):
        spread = abs(high) * 0.1 or 1.0
        low, high = (0.0 if low == 0 else low - spread), high + spread
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    steps = [at * step for at in range(first, last + 1)]
    return steps[0], steps[-1], steps


def _places(points: Sequence[Point], low: float, high: float, margin: float = 0.0) -> list[tuple[float, float] | None]:
    """The positions of the points in the drawing; None for those without a value."""
    inner, places = _HEIGHT - 2 * margin, list[tuple[float, float] | None]()
    for at, point in enumerate(points):
        across = 12 + (_WIDTH - 24) * at / max(1, len(points) - 1) if len(points) > 1 else _WIDTH / 2
        down = None if point.value is None else margin + inner * (1 - (point.value - low) / (high - low))
        places.append(None if down is None else (across, down))
    return places


def _line(places: Sequence[tuple[float, float] | None], kind: str) -> Markup:
    """Through all points that there are; where one is missing, the line has a gap."""
    path, is_on = "", False
    for place in places:
        if place is not None:
            path += f"{'L' if is_on else 'M'}{place[0]:.1f} {place[1]:.2f}"
        is_on = place is not None
    return tag("path", d=path, class_=kind)


def _dot(place: tuple[float, float] | None, kind: str, title: str) -> Markup | None:
    """A line without length and with round ends, which stays round however the drawing is stretched."""
    if place is None:
        return None
    return tag("path", tag("title", title), d=f"M{place[0]:.1f} {place[1]:.2f}h0.01", class_=kind)


def _grid(steps: Sequence[float], low: float, high: float) -> Markup:
    lines = "".join(f"M0 {_HEIGHT * (1 - (step - low) / (high - low)):.2f}H{_WIDTH}" for step in steps)
    return tag("path", d=lines, class_="grid")


def _drawing(shapes: Sequence[Markup | None], kind: str, told: str) -> Markup:
    box = f"0 0 {_WIDTH} {_HEIGHT}"
    return tag(
        "svg",
        *shapes,
        viewBox=box,
        preserveAspectRatio="none",
        class_=kind,
        role="img",
        aria_label=told,
        focusable="false",
    )


def _figure(
    shapes: Sequence[Markup | None],
    marks: Sequence[Markup],
    ticks: Sequence[tuple[str, float]],
    ends: tuple[str, str] | None,
    label: str,
    *,
    low: bool = False,
) -> Markup:
    """A drawing with words at its left and below it; `ticks` are words and how far down they are."""
    words = [tag("span", word, style=f"top:{down:.2%}") for word, down in ticks]
    widest = max((len(word) for word, _ in ticks), default=0)
    below = None if ends is None else tag("div", tag("span", ends[0]), tag("span", ends[1]), class_="ends")
    return tag(
        "div",
        tag("div", *words, class_="ticks", aria_hidden="true", style=f"width:{max(4, widest) + 1}ch"),
        tag("div", _drawing(shapes, "plot", label), *marks, class_="area-of-plot"),
        below,
        class_="chart low" if low else "chart",
    )


def _short(number: float) -> str:
    """Thousands as k, millions as M."""
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{name}"
    return f"{number:.3g}"
