"""`flexgen-helm reproduce RUN_DIR`: repeats a finished run from the record next to its files and compares results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint.identity.result import differences
from engine.errors import ConfigError, InstallationError
from engine.memory.replaced import replace_text
from flexgen_helm.terminal.columns import columns
from flexgen_helm.terminal.installation import model_problem
from flexgen_helm.terminal.parser import Parser

if TYPE_CHECKING:
    from flexgen_helm.fidelity.reproduction import Count, Reproduction
    from flexgen_helm.helm.records.provenance import Provenance

DESCRIPTION = """
Run a finished run again from flexgen_run.json, the record that `run` and `sweep` write next to its files: with the same
run spec, checkpoint, policy, dtype and date, on this machine with its installed software. Every request is computed
again, whatever HELM's cache holds, and the run's files are not changed. Exit code 0: requests, answers, statistics and
score are equal, up to rounding in log-probabilities. 1: something differs. 2: bad input, such as a directory without a
record, or a checkpoint that has changed since.
"""
EXAMPLES = (
    "flexgen-helm reproduce benchmark_output/runs/nightly/mmlu:subject=anatomy,model=facebook_opt-30b",
    "flexgen-helm reproduce benchmark_output/runs/nightly/mmlu:* --json again.json",
)
_SHOWN = 5
"""Differing answers, and differing statistics, that are printed; `--json` has more of them."""


def reproduce(arguments: Sequence[str]) -> int:
    """Run again, compare, print; returns the exit code. `EngineError` for bad input, `RunFailed` for a failed run."""
    args = _parse(arguments)
    if problem := model_problem():
        raise InstallationError(problem)
    from flexgen_helm.fidelity.again import run_again
    from flexgen_helm.fidelity.reproduction import reproduction_of, tolerance_of
    from flexgen_helm.helm.records.provenance import read_provenance
    from flexgen_helm.runs.launch import set_up_logging

    set_up_logging(args)
    path = args.run_dir.resolve()
    _check_directory(path)
    found = read_provenance(path)
    with run_again(path, found) as again:
        now = read_provenance(again)
        result = reproduction_of(path, again, tolerance_of(found, now))
    for line in _lines(found, now, result):
        print(line)
    if args.json is not None:
        made = {"policy": found.policy, "seeds": found.seeds}
        _write(args.json, {**result.as_mapping(), **made, "then": _made_by(found), "now": _made_by(now)})
    return 0 if result.is_equal else 1


def reproduce_parser() -> Parser:
    """The command line of `flexgen-helm reproduce`."""
    parser = Parser(prog="flexgen-helm reproduce", description=DESCRIPTION, examples=EXAMPLES)
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="a run's directory, in benchmark_output/runs/SUITE"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the whole comparison to FILE")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and HELM's own log")
    parser.set_defaults(log_config=None)
    return parser


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    args = reproduce_parser().parse_args(arguments)
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise ConfigError(f"--json {args.json} cannot be written: name a file in a directory that is there")
    return args


def _check_directory(path: Path) -> None:
    """Raise `ConfigError` for what is no run's directory, and name what may have been meant."""
    if not path.is_dir():
        raise ConfigError(f"there is no directory {path}; name a run's, in benchmark_output/runs/SUITE")
    if (path / "run_spec.json").is_file():
        return
    runs = sorted(each.parent.name for each in path.glob("*/run_spec.json"))
    if runs:
        raise ConfigError(f"{path} is a suite of {len(runs)} runs; name one of them, such as {path / runs[0]}")
    raise ConfigError(
        f"{path} is no run of HELM: it has no run_spec.json; name a directory in benchmark_output/runs/SUITE"
    )


def _made_by(found: Provenance) -> dict[str, Any]:
    """Software, machine and model of a run, for JSON."""
    parts = {"versions": found.versions, "commit": found.commit, "identity": found.identity}
    return {**parts, "hardware": vars(found.hardware)}


def _lines(found: Provenance, now: Provenance, result: Reproduction) -> Iterator[str]:
    yield result.run
    yield f"made {found.written} on {found.hardware.device}; weights {str(found.identity.get('weights'))[:12]}"
    changed = [*_changes(found.versions, now.versions), *_changes(_place(found.hardware), _place(now.hardware))]
    if software := differences(found.identity, now.identity):  # another checkpoint is refused
        changed.append(software)
    if found.commit != now.commit:
        changed.append(f"commit {found.commit} -> {now.commit}")
    yield f"since then: {', '.join(changed) if changed else 'the same versions, on the same kind of machine'}"
    yield ""
    rows = [
        ("requests", _told(result.requests)),
        ("answers", _told(result.answers)),
        ("log-probabilities", _logprobs(result)),
        ("statistics", _told(result.statistics)),
        (f"score: {result.metric}", f"{_number(result.before)} -> {_number(result.after)}"),
    ]
    yield columns(rows, 2)
    for name in ("requests", "answers", "statistics"):
        differing = getattr(result, name).differing
        yield from (f"differs: {each}" for each in differing[:_SHOWN])
    yield ""
    yield "equal" if result.is_equal else f"DIFFERENT: {', '.join(_reasons(result))}"


def _place(hardware: Any) -> dict[str, str]:
    return {"device": hardware.device, "cores": str(hardware.cores)}


def _changes(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What has another value now."""
    return [
        f"{name} {then.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in {**then, **now}
        if then.get(name) != now.get(name)
    ]


def _told(count: Count) -> str:
    return f"{count.equal} of {count.total} equal"


def _logprobs(result: Reproduction) -> str:
    told = f"{result.logprobs.equal} of {result.logprobs.total} equal to the last bit"
    if result.logprobs.is_whole:
        return told
    allowed = f"rounding explains {result.tolerance:g}" if result.tolerance else "none is due to rounding"
    return f"{told}; they differ by {result.largest_difference:.2g} at most ({allowed})"


def _reasons(result: Reproduction) -> Iterator[str]:
    for name in ("requests", "answers", "statistics"):
        count = getattr(result, name)
        if not count.is_whole:
            yield f"{count.total - count.equal} of {count.total} {name}"
    if result.largest_difference > result.tolerance:
        yield f"log-probabilities by up to {result.largest_difference:.2g}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    try:
        replace_text(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; name another --json") from None
