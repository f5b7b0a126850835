"""`flexgen-helm report SUITE`: writes report.html and report.json into a suite's directory."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from engine.errors import ConfigError
from engine.memory.replaced import replace_text
from flexgen_helm.suites.suite import find_suite, read_suite
from flexgen_helm.terminal.parser import Parser

HTML_NAME = "report.html"
DESCRIPTION = """
Write report.html, a self-contained page, and report.json into a suite's directory: scores compared with the
previous suite's and a reference's, speed, where the time went, drift, failed runs, and the trend of the last suites. A
sweep does this at its end; this command also works on unfinished suites and on those of plain helm-run.
"""
EXAMPLES = (
    "flexgen-helm report 2026-11-29",
    "flexgen-helm report benchmark_output/runs/mine --previous benchmark_output/runs/yesterday",
)


def report(arguments: Sequence[str]) -> int:
    """Write a suite's report and say where; `ConfigError` for bad input."""
    args = parse_report_flags(arguments)
    suite, previous = (find_suite(each, args.output_path) if each else None for each in (args.suite, args.previous))
    assert suite is not None
    reference = args.reference
    if reference is not None and not reference.exists():
        reference = find_suite(str(reference), args.output_path)
    print(write_report(suite, previous=previous, reference=reference))
    return 0


def report_parser() -> Parser:
    """The command line of `flexgen-helm report`."""
    parser = Parser(prog="flexgen-helm report", description=DESCRIPTION, examples=EXAMPLES)
    parser.add_argument("suite", metavar="SUITE", help="a suite's directory, or its name in --output-path")
    parser.add_argument(
        "--previous",
        metavar="DIR",
        help="suite to compare with (default: the latest earlier sweep in the same directory)",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="PATH",
        help="reference scores: a suite of helm-run, or a fidelity.json of verify",
    )
    parser.add_argument(
        "-o",
        "--output-path",
        type=Path,
        default=Path("benchmark_output"),
        help="directory of the suites (default: %(default)s)",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def parse_report_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; raises `UsageError`."""
    return report_parser().parse_args(arguments)


def write_report(suite_path: Path, *, previous: Path | None = None, reference: Path | None = None) -> Path:
    """Write both files into `suite_path`, each at once or not at all; returns the page's path.

    Raises `ConfigError` where `suite_path` or `previous` holds no runs, a record cannot be read, `reference` is neither
    a suite's directory nor a fidelity.json, or the files cannot be written.
    """
    from flexgen_helm.reports.data import JSON_NAME, gather
    from flexgen_helm.reports.page import page

    found = gather(read_suite(suite_path), read_suite(previous) if previous else None, reference)
    told = json.dumps(found.mapping(), indent=1, allow_nan=False) + "\n"
    shown = page(found)
    try:
        replace_text(suite_path / JSON_NAME, told)
        replace_text(suite_path / HTML_NAME, shown)
    except OSError as error:
        raise ConfigError(f"the report cannot be written into {suite_path}: {error.strerror}") from None
    return suite_path / HTML_NAME
