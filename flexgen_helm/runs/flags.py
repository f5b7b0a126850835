"""The command line of `flexgen-helm run`: HELM's own flags, FlexGen's, and those that name model and policy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.policy import Policy, read_policy_yaml
from flexgen_helm.terminal.parser import Parser

PolicySpec = str | dict[str, Any]
"""A policy as a deployment's `args` have it: a name, a file, or the mapping itself."""


def run_parser(
    prog: str = "flexgen-helm run",
    description: str = "Run HELM entries through the offloading engine; with no entries, the demo.",
) -> Parser:
    """HELM's own parser with FlexGen's flags added; imports HELM."""
    from helm.benchmark.run import build_parser

    helm = build_parser()  # type: ignore[no-untyped-call]
    parser = Parser(
        prog=prog,
        description=description,
        parents=[helm],
        conflict_handler="resolve",
        epilog="Flags that are not under FlexGen are HELM's own, with HELM's defaults.",
    )
    for flags, what in (
        (("-r", "--run-entries"), "run entries"),
        (("-c", "--conf-paths"), "files of run entries, or names of shipped ones such as quick"),
    ):
        parser.add_argument(*flags, nargs="+", action="extend", default=[], help=f"{what}; any number, may be repeated")
    parser.add_argument("-m", "--max-eval-instances", type=int, help="evaluate at most this many instances of a run")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and HELM's own log")
    # None tells what was not given: the demo has a place of its own.
    parser.set_defaults(output_path=None)
    _add_model_flags(parser)
    return parser


def _add_model_flags(parser: Parser) -> None:
    group = parser.add_argument_group("FlexGen", "the model and where it lives; the flags override --policy")
    group.add_argument(
        "--description",
        nargs="+",
        action="extend",
        default=[],
        metavar="ENTRY",
        help="run entries; whatever model they name, --model is meant",
    )
    group.add_argument("--model", help="hub id or directory of the model")
    group.add_argument("--path", help="where the weights are, if not under --model")
    group.add_argument("--run-path", dest="output_path", metavar="DIR", default=argparse.SUPPRESS, help="same as -o")
    add_length_flag(group)
    add_policy_flags(group)


def add_policy_flags(group: argparse._ActionsContainer) -> None:
    """Add what `policy_from_flags` reads."""
    group.add_argument("--policy", help="a shipped policy's name, a YAML file, or auto (default)")
    group.add_argument("--pad-to-seq-len", type=_pad, metavar="N", help="pad every prompt to N tokens, or: bucket")
    group.add_argument("--gpu-batch-size", type=int, metavar="N", help="most sequences in a micro-batch")
    group.add_argument("--num-gpu-batches", type=int, metavar="N", help="most micro-batches in a sweep")
    group.add_argument(
        "--percent",
        nargs="+",
        type=int,
        metavar="P",
        help="six numbers: weights, cache and activations, each on GPU and CPU; the rest is disk",
    )
    group.add_argument("--offload-dir", metavar="DIR", help="directory of the disk tier")
    for flag, what in (
        ("--pin-weight", "keep host weights page-locked"),
        ("--cpu-cache-compute", "attend over host-resident KV on the CPU"),
    ):
        group.add_argument(flag, type=_boolean, nargs="?", const=True, metavar="BOOL", help=what)
    for flag, what in (("--compress-weight", "weights"), ("--compress-cache", "KV cache")):
        group.add_argument(flag, type=_bits, nargs="?", const=True, metavar="BITS", help=f"{what} in 4 or 8 bits")


def add_length_flag(parser: argparse._ActionsContainer) -> None:
    """Add the flag of what `registration` makes HELM's max_sequence_length of."""
    parser.add_argument(
        "--max-sequence-length",
        type=int,
        metavar="N",
        help="longest prompt and answer together that HELM is to make (default: what the model's files tell)",
    )


def policy_from_flags(args: argparse.Namespace) -> PolicySpec | None:
    """Return the policy that `--policy` and FlexGen's flags mean, in the form a deployment's `args` take.

    None if none of them is given. Raises `ConfigError` if it is no policy.
    """
    overrides = {
        key: value
        for key in (
            "pad-to-seq-len",
            "gpu-batch-size",
            "num-gpu-batches",
            "percent",
            "offload-dir",
            "pin-weight",
            "cpu-cache-compute",
            "compress-weight",
            "compress-cache",
        )
        if (value := getattr(args, key.replace("-", "_"))) is not None
    }
    if not overrides:
        return None if args.policy is None else checked_policy(args.policy)
    if "offload-dir" in overrides:
        overrides["offload-dir"] = str(Path(overrides["offload-dir"]).expanduser().absolute())
    base = {} if args.policy in (None, "auto") else dict(read_policy_yaml(args.policy))
    if "percent" in overrides:
        for key in ("weights", "kv-cache", "activations"):
            base.pop(key, None)
    merged = base | overrides
    Policy.from_mapping(merged, where=f"policy {args.policy} with flags" if base else "flags")
    return merged


def checked_policy(name: str) -> str:
    """Return a policy's name, or its file's absolute path; `ConfigError` if it is no policy."""
    Policy.load(name)
    file = Path(name).expanduser()
    return str(file.absolute()) if file.is_file() else name


def parse_run_flags(arguments: Sequence[str], parser: Parser | None = None) -> argparse.Namespace:
    """Parse the command line of `run` (or of another `run_parser`); `ConfigError` for what cannot be meant."""
    args = (parser or run_parser()).parse_args(arguments)
    if args.cache_instances_only and not args.cache_instances:
        raise ConfigError("--cache-instances-only needs --cache-instances")
    if args.max_eval_instances is not None and args.max_eval_instances < 1:
        raise ConfigError(f"-m {args.max_eval_instances}: evaluate at least 1 instance, or leave -m out for all")
    if args.num_threads < 1:
        raise ConfigError(f"-n {args.num_threads}: at least 1 thread is needed")
    if args.model is not None and args.models_to_run:
        raise ConfigError("give either --model or --models-to-run, not both")
    if args.path is not None and args.model is None:
        raise ConfigError("--path says where the weights of --model are; give --model too")
    return args


def _boolean(text: str) -> bool:
    if text.lower() in ("1", "true", "t", "yes", "y"):
        return True
    if text.lower() in ("0", "false", "f", "no", "n"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither 1 nor 0")


def _bits(text: str) -> bool | int:
    return int(text) if text in ("4", "8") else _boolean(text)


def _pad(text: str) -> int | str:
    if text == "bucket":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is neither a number of tokens nor "bucket"') from None
