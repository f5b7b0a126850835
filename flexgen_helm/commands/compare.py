"""`flexgen-helm compare A B`: the gate between two suites, and the table of what differs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from engine.errors import ConfigError
from engine.memory.replaced import replace_text
from flexgen_helm.helm.scores import short_name
from flexgen_helm.suites.comparison import CONFIDENCE, SLOWDOWN, Comparison, ScoreChange, compare_suites
from flexgen_helm.suites.speed import SpeedChange
from flexgen_helm.suites.suite import find_suite, read_suite
from flexgen_helm.terminal.columns import columns
from flexgen_helm.terminal.errors import UsageError
from flexgen_helm.terminal.parser import Parser

MOST_ROWS = 12
"""The number of rows up to which differences within noise are shown."""
DESCRIPTION = """
Compare suite B with an earlier suite A. Exit code 0: nothing is worse. 1: a score is worse by more than chance explains
(bootstrap over instances, paired where both suites have the same ones, corrected by Holm for the number of scores), a
run is missing, failed or without a score, or a model computes fewer tokens per second for the same work on the same
hardware, by more than --slowdown. 2: bad input. Improvements are shown and do not change the exit code.
"""
EXAMPLES = (
    "flexgen-helm compare 2026-11-28 2026-11-29",
    "flexgen-helm compare benchmark_output/runs/before benchmark_output/runs/after --slowdown 0.1 --json change.json",
)


def compare(arguments: Sequence[str]) -> int:
    """Compare two suites and print what differs; returns the exit code. `ConfigError` for bad input."""
    args = parse_compare_flags(arguments)
    before, after = (read_suite(find_suite(each, args.output_path)) for each in (args.before, args.after))
    for suite in (before, after):
        if not suite.runs:
            raise ConfigError(f"{suite.path} has no runs yet; there is nothing to compare")
    comparison = compare_suites(before, after, confidence=args.confidence, slowdown=args.slowdown)
    print(table(comparison))
    if args.json is not None:
        text = json.dumps(comparison.mapping(), indent=1, allow_nan=False)
        try:
            replace_text(args.json, text + "\n")
        except OSError as error:
            raise ConfigError(f"{args.json} cannot be written: {error.strerror}; name another --json") from None
    return 1 if comparison.failures else 0


def compare_parser() -> Parser:
    """The command line of `flexgen-helm compare`."""
    parser = Parser(prog="flexgen-helm compare", description=DESCRIPTION, examples=EXAMPLES)
    parser.add_argument("before", metavar="A", help="a suite's directory, or its name in --output-path")
    parser.add_argument("after", metavar="B", help="the later suite, written likewise")
    parser.add_argument(
        "--slowdown",
        type=float,
        default=SLOWDOWN,
        help="loss of speed that is too much, as a fraction (default: %(default)s)",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        default=CONFIDENCE,
        help="confidence level for all scores together (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the whole comparison to FILE")
    parser.add_argument(
        "-o",
        "--output-path",
        type=Path,
        default=Path("benchmark_output"),
        help="directory of the suites (default: %(default)s)",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def parse_compare_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; raises `UsageError`."""
    args = compare_parser().parse_args(arguments)
    for flag, least in (("slowdown", 0.0), ("confidence", 0.5)):
        if not least <= getattr(args, flag) < 1:
            raise UsageError(f"--{flag} {getattr(args, flag)} is not a share from {least:g} to below 1")
    if args.json is not None and args.json.is_dir():
        raise UsageError(f"--json {args.json} is a directory; name a file")
    if args.json is not None and not args.json.parent.is_dir():
        raise UsageError(f"--json {args.json}: there is no directory {args.json.parent}")
    return args


def table(comparison: Comparison) -> str:
    """What differs, the failures first and then by size; one line for all the rest, and the verdict."""
    parts = [f"{comparison.before} -> {comparison.after}"]
    changes = sorted((*comparison.means, *comparison.scores), key=_order)
    shown = [change for change in changes if change.verdict != "same"]
    shown += [change for change in changes if change.verdict == "same" and change.difference]
    num_told = sum(change.verdict != "same" for change in changes)
    shown = shown[: max(num_told, MOST_ROWS)]
    models = {change.model for change in shown}
    if shown:
        head = ("", "run", "metric", "before", "after", "difference", f"{comparison.confidence:.0%} interval", "p")
        rows = [_row(change, shorten=len(models) == 1) for change in shown]
        parts.append(columns([head, *rows], 3))
        parts += [f"{row[1]}: {change.reason}" for row, change in zip(rows, shown, strict=True) if change.reason]
    if left := len(changes) - len(shown):
        what = "scores are" if left > 1 else "score is"
        parts.append(
            f"{left} {'other ' if shown else ''}{what} the same or differ{'' if left > 1 else 's'} less, within noise"
        )
    if comparison.speeds:
        rows = [
            ("", "model", "tokens/s before", "after", "change"),
            *(
                (
                    _told(each),
                    each.deployment,
                    _number(each.before, ".1f"),
                    _number(each.after, ".1f"),
                    _number(each.change, "+.1%"),
                )
                for each in comparison.speeds
            ),
        ]
        parts.append(columns(rows, 2))
        parts += [f"{each.deployment}: {each.reason}" for each in comparison.speeds if each.reason]
    return "\n\n".join([*parts, verdict(comparison)])


def verdict(comparison: Comparison) -> str:
    """The finding in one line."""
    tested = f"{comparison.num_tests} scores compared at {comparison.confidence:.0%}, corrected for their number"
    if not comparison.failures:
        better = sum(change.verdict == "better" for change in (*comparison.scores, *comparison.means))
        return f"passed: nothing is worse{f', {better} better' if better else ''} ({tested})"
    counts: dict[str, int] = {}
    for change in comparison.failures:
        counts[change.verdict] = counts.get(change.verdict, 0) + 1
    return f"FAILED: {', '.join(f'{count} {name}' for name, count in counts.items())} ({tested})"


def _order(change: ScoreChange) -> tuple[bool, bool, float, str]:
    return (not change.is_failure, change.verdict == "same", -abs(change.difference or float("inf")), change.name)


def _row(change: ScoreChange, *, shorten: bool) -> tuple[str, ...]:
    interval = "" if change.low is None or change.high is None else f"{change.low:+.3f} .. {change.high:+.3f}"
    return (
        _told(change),
        short_name(change.name) if shorten else change.name,
        change.metric,
        _number(change.before, ".3f"),
        _number(change.after, ".3f"),
        _number(change.difference, "+.3f"),
        interval,
        _number(change.p_value, ".2g"),
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _told(change: ScoreChange | SpeedChange) -> str:
    """A verdict, loud where it fails the gate."""
    return change.verdict.upper() if change.is_failure else "" if change.verdict == "same" else change.verdict
