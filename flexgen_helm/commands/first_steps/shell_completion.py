"""`flexgen-helm completion SHELL`: prints a shell script that completes commands, flags and file names."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from engine.errors import InstallationError
from flexgen_helm.terminal.parser import Parser

SHELLS = ("bash", "zsh", "fish", "tcsh")
DESCRIPTION = """
Print a script with which a shell completes the commands, flags, choices and file names of flexgen-helm. Write it to
where the shell looks for such scripts, and start a new shell. Needs shtab: pip install 'flexgen-helm[completion]'.
"""
EXAMPLES = (
    "flexgen-helm completion bash > ~/.local/share/bash-completion/completions/flexgen-helm",
    "flexgen-helm completion zsh > ~/.zfunc/_flexgen-helm    # with fpath+=~/.zfunc before compinit, in ~/.zshrc",
    "flexgen-helm completion fish > ~/.config/fish/completions/flexgen-helm.fish",
)
_DIRECTORIES = ("A", "B", "DIR", "RUN_DIR", "SUITE", "offload_dir", "out", "output_path")
_FILES = ("CONF", "FILE", "MODEL", "PATH", "POLICY", "PROFILE", "model", "path", "policy", "shape")
"""Metavars and names of arguments whose values are directories, and of those whose values are files or directories."""


def completion_parser() -> Parser:
    """The command line of `flexgen-helm completion`."""
    parser = Parser(prog="flexgen-helm completion", description=DESCRIPTION, examples=EXAMPLES)
    parser.add_argument("shell", choices=SHELLS, help="the shell that is to complete")
    return parser


def completion(arguments: Sequence[str], commands: Mapping[str, str]) -> int:
    """Print the script; `commands`: each command's summary, by name. Raises `InstallationError` if shtab is missing."""
    args = completion_parser().parse_args(arguments)
    try:
        import shtab
    except ImportError as error:
        raise InstallationError(
            f"shtab, which writes the scripts, is missing ({error}); run `pip install 'flexgen-helm[completion]'`"
        ) from error
    parser = _whole_parser(commands)
    for action in _actions(parser):
        if action.choices is None and action.nargs != 0 and (kind := _named(action)) is not None:
            action.complete = shtab.DIRECTORY if kind == "directory" else shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell=args.shell))
    return 0


def _whole_parser(commands: Mapping[str, str]) -> argparse.ArgumentParser:
    """Build one parser with a subparser for each command and its flags; it is used for completion only."""
    parsers = _parsers()
    whole = argparse.ArgumentParser(prog="flexgen-helm")
    whole.add_argument("--version", action="store_true", help="show the version")
    each = whole.add_subparsers(dest="command", parser_class=argparse.ArgumentParser)
    for name, what in commands.items():
        each.add_parser(name, help=what, parents=[parsers[name]], add_help=False)
    return whole


def _parsers() -> dict[str, argparse.ArgumentParser]:
    from flexgen_helm.commands.bench import bench_parser
    from flexgen_helm.commands.check import check_parser
    from flexgen_helm.commands.compare import compare_parser
    from flexgen_helm.commands.complete import complete_parser
    from flexgen_helm.commands.completion.serve import serve_parser
    from flexgen_helm.commands.doctor import doctor_parser
    from flexgen_helm.commands.first_steps.demo import demo_parser
    from flexgen_helm.commands.lm_eval import lm_eval_parser
    from flexgen_helm.commands.plan import entries_parser, plan_parser
    from flexgen_helm.commands.register import register_parser
    from flexgen_helm.commands.report import report_parser
    from flexgen_helm.commands.reproduce import reproduce_parser
    from flexgen_helm.commands.sweep import sweep_parser
    from flexgen_helm.commands.verify import verify_parser
    from flexgen_helm.runs.flags import add_stop_flag, run_parser

    run = run_parser()
    add_stop_flag(run)
    both = Parser(prog="flexgen-helm plan", parents=[entries_parser(), plan_parser()], conflict_handler="resolve")
    return {
        "bench": bench_parser(),
        "check": check_parser(),
        "compare": compare_parser(),
        "complete": complete_parser(),
        "completion": completion_parser(),
        "demo": demo_parser(),
        "doctor": doctor_parser(),
        "lm-eval": lm_eval_parser(),
        "plan": both,
        "register": register_parser(),
        "report": report_parser(),
        "reproduce": reproduce_parser(),
        "run": run,
        "serve": serve_parser(),
        "sweep": sweep_parser(),
        "verify": verify_parser(),
    }


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _actions(each)
        else:
            yield action


def _named(action: argparse.Action) -> str | None:
    """What an argument's value is: "directory", "file" (a file or directory), or None."""
    name = action.metavar or action.dest
    if name in _DIRECTORIES:
        return "directory"
    return "file" if action.type is Path or name in _FILES else None
