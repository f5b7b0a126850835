"""Numbers as a report's page shows them."""

from __future__ import annotations

from flexgen_helm.suites.comparison import ScoreChange

NONE = "\N{EN DASH}"
"""Stands where there is no number."""
MINUS = "\N{MINUS SIGN}"


def number(value: float | None) -> str:
    """A score: three decimals, fewer where it is large."""
    if value is None:
        return NONE
    size = abs(value)
    return f"{value:.3f}" if size < 100 else f"{value:.1f}" if size < 10_000 else f"{value:.3g}"


def signed(value: float | None) -> str:
    """A difference, with its sign."""
    if value is None:
        return NONE
    shown = f"{value:+.3f}" if abs(value) < 100 else f"{value:+.3g}"
    return "0" if float(shown) == 0 else shown.replace("-", MINUS)


def signed_percent(value: float | None) -> str:
    """A change as a share, with its sign."""
    return NONE if value is None else f"{value:+.1%}".replace("-", MINUS)


def percent(value: float | None) -> str:
    """A share."""
    return NONE if value is None else f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def clock(seconds: float | None) -> str:
    """A time span in words: `2 h 14 min`, `3 min 5 s`, `4.2 s`."""
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def plural(count: int, what: str) -> str:
    """A count of things."""
    ending = "" if count == 1 else "es" if what.endswith("s") else "s"
    return f"{count:,} {what}{ending}"


def change_class(change: ScoreChange | None) -> str:
    """The colour of a change: of its verdict, not of its sign."""
    if change is None or change.verdict in ("same", "not compared", "new"):
        return "soft"
    return "good" if change.verdict == "better" else "bad"
