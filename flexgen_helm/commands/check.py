"""`flexgen-helm check`: whether a model runs here, how, what it needs, and whether it equals plain transformers.

The model's files are examined as a run would open them; no weights are read, and a hub id's weights are not downloaded.
Then the engine runs a small copy with random weights, in which everything that config.json enables stays enabled, on
the CPU in float32, and compares it with plain transformers. Imports no HELM.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError
from flexgen_helm.terminal.errors import UsageError
from flexgen_helm.terminal.parser import Parser

if TYPE_CHECKING:
    from flexgen_helm.checking.examined import Examined
    from flexgen_helm.checking.trial import Trial

EXAMPLES = (
    "flexgen-helm check Qwen/Qwen3-30B-A3B",
    "flexgen-helm check /data/my-model --json check.json",
    "flexgen-helm check /data/my-model/config.json head_dim=16",
)
EPILOG = """
Exit code 0: it runs, and the copy is equal. 1: it runs, and the copy differs. 2: it is refused, or undecided, each with
its reason, or bad input.
"""
EXIT_CODES = {"equal": 0, "different": 1, "refused": 2, "undecided": 2}


def check_parser() -> Parser:
    """The command line of `flexgen-helm check`."""
    parser = Parser(
        prog="flexgen-helm check", description=__doc__, epilog=EPILOG, examples=EXAMPLES, texts=("changes",)
    )
    parser.add_argument("model", metavar="MODEL", help="a hub id, a model directory, a GGUF file, or a config.json")
    told = "settings that replace those of config.json in the copy, such as head_dim=16 or use_cache=false"
    parser.add_argument("changes", metavar="KEY=VALUE", nargs="*", help=told)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all findings to FILE")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def parse_check_flags(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse the command line, and the settings that it changes; raises `UsageError`."""
    args = check_parser().parse_args(arguments)
    if args.json is not None and args.json.is_dir():
        raise UsageError(f"--json {args.json} is a directory; name a file")
    if args.json is not None and not args.json.parent.is_dir():
        raise UsageError(f"--json {args.json}: there is no directory {args.json.parent}")
    return args, dict(map(_setting, args.changes))


def _setting(change: str) -> tuple[str, Any]:
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise UsageError(f"{change!r} is not KEY=VALUE (see flexgen-helm check --help)")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def check(arguments: Sequence[str]) -> int:
    """Examine, try, print; the exit code. `EngineError` for a model that is not there, and for impossible changes."""
    args, changes = parse_check_flags(arguments)
    import transformers

    from flexgen_helm.checking.examined import examine
    from flexgen_helm.checking.shrinking import config_from
    from flexgen_helm.checking.trial import try_copy
    from flexgen_helm.checking.undecided import UndecidedError

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found = examine(args.model)
    for line in examined_lines(found):
        print(line, flush=True)
    trial, reasons = None, list(found.refusals)
    if not reasons:
        full = config_from(found.config, changes)
        try:
            trial = try_copy(full, changes, found.quantization)
        except UndecidedError as error:
            reasons = [str(error)]
        else:
            reasons = [*trial.open_questions]
            for line in trial_lines(trial):
                print(line)
    verdict = verdict_of(found, trial, reasons)
    if args.json is not None:
        _write(args.json, {"verdict": verdict, "reasons": reasons, "changes": changes, **_mapping(found, trial)})
    print(f"{verdict.upper()}: {_told(verdict, trial, reasons)}")
    return EXIT_CODES[verdict]


def verdict_of(found: Examined, trial: Trial | None, reasons: Sequence[str]) -> str:
    """One of `EXIT_CODES`: "different" takes precedence over anything unknown."""
    if found.refusals:
        return "refused"
    if trial is not None and trial.verdict == "different":
        return "different"
    return "undecided" if reasons or trial is None else "equal"


def examined_lines(found: Examined) -> list[str]:
    """What is known of the model, a line each, with what it is about in front."""
    rows = []
    if found.facts is not None:
        rows += [("model", found.facts.family)] + [("path", line) for line in found.facts.lines()]
    if found.window is not None:
        rows.append(("window", f"{found.window:,} tokens"))
    if found.needs is not None:
        rows += [("needs", line) for line in found.needs.lines()]
    if found.here is not None:
        rows.append(("here", found.here))
    if found.tokenizer is not None:
        rows += [("tokenizer", line) for line in found.tokenizer.lines()]
    rows += [("note", note) for note in found.notes]
    return [f"{about:<9}  {line}" for about, line in rows]


def trial_lines(trial: Trial) -> list[str]:
    """What came of the copy, a line for each policy."""
    how = f"packed by {trial.packed}, float32 on the CPU" if trial.packed else "float32 on the CPU"
    lines = [f"{'copy':<9}  {trial.num_layers} layers, {trial.parameters:,} random parameters, {how}"]
    for run in trial.runs:
        found = f"{run.differing} of {run.jobs} prompts differ, log-probabilities within {run.largest:.1e}"
        lines.append(f"{'':<9}  {run.policy}: {found}")
        lines += [f"{'':<11}{line}" for line in run.first]
    return lines


def _told(verdict: str, trial: Trial | None, reasons: Sequence[str]) -> str:
    if verdict in ("equal", "different"):
        assert trial is not None
        largest = f"{trial.largest:.1e}"
        if verdict == "equal":
            return f"the copy's tokens are those of plain transformers, and log-probabilities are within {largest}"
        return "the copy's answers are not those of plain transformers"
    return "; ".join(reasons)


def _mapping(found: Examined, trial: Trial | None) -> dict[str, Any]:
    return {**found.mapping(), "copy": None if trial is None else trial.mapping()}


def _write(file: Path, content: Mapping[str, Any]) -> None:
    from engine.memory.replaced import replace_text

    try:
        replace_text(file, json.dumps(content, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}; name another --json") from None
