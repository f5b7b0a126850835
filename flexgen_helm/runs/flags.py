"""The command line of `flexgen-helm run`: flags that name the model and its policy, FlexGen's, and HELM's own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from engine.errors import ConfigError
from engine.policy import Policy, read_policy_yaml
from flexgen_helm.runs.helm_flags import add_helm_flags
from flexgen_helm.runs.names import check_suite_name
from flexgen_helm.terminal.deadline import moment
from flexgen_helm.terminal.parser import Parser

POLICY = "where weights, KV cache and activations are kept, and how; these flags override --policy's settings"
PolicySpec = str | dict[str, Any]
"""A policy as in a deployment's `args`: a name, a file, or the mapping itself."""
CHAT_TEMPLATE = {"yes": True, "no": False, "auto": None}
"""A deployment's `apply_chat_template` by the flag's value; None is left out, so that HELM's rule applies."""


RUN_EXAMPLES = (
    "flexgen-helm run --model facebook/opt-30b --policy opt-30b-t4 -r mmlu:subject=anatomy -m 100",
    "flexgen-helm run --model ./my-model --gpu-memory 16GB -c quick -m 10 --suite first",
    "flexgen-helm run    # no entries: the demo",
)


def run_parser(
    prog: str = "flexgen-helm run",
    description: str = "Run HELM entries through the offloading engine; with no entries, the demo.",
    examples: Sequence[str] = RUN_EXAMPLES,
) -> Parser:
    """FlexGen's flags and ours in groups, HELM's after them; imports neither HELM nor torch."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} [FLAGS]",
        description=description,
        examples=examples,
        texts=("run_entries", "run_specs", "description", "mongo_uri", "server_url"),
        conflict_handler="resolve",
    )
    _add_model_flags(parser.group("model"))
    _add_entry_flags(parser.group("what to run"))
    add_policy_flags(parser.group("policy", POLICY))
    output = parser.group("output")
    # None means not given: the demo has a default of its own.
    output.add_argument(
        "-o", "--output-path", metavar="DIR", help="directory of the suites (default: benchmark_output)"
    )
    output.add_argument("--run-path", dest="output_path", metavar="DIR", default=argparse.SUPPRESS, help="same as -o")
    output.add_argument(
        "--suite", default="default", help="name of the suite: its runs are in DIR/runs/SUITE (default: default)"
    )
    output.add_argument("--debug", action="store_true", help="show tracebacks and HELM's own log")
    add_helm_flags(parser.group("HELM", "HELM's own flags, with HELM's defaults"))
    return parser


def _add_model_flags(group: argparse._ActionsContainer) -> None:
    group.add_argument("--model", help="hub id (or org/model@revision), directory or GGUF file of the model")
    group.add_argument("--path", help="directory of the weights, if they are not at --model")
    add_length_flag(group)
    add_shaping_flags(group)


def _add_entry_flags(group: argparse._ActionsContainer) -> None:
    for flags, metavar, what in (
        (("-r", "--run-entries"), "ENTRY", "run entries, such as mmlu:subject=anatomy"),
        (("-c", "--conf-paths"), "CONF", "files of run entries, or names of shipped ones such as quick"),
        (("--description",), "ENTRY", "run entries, whose model is replaced by --model"),
    ):
        told = f"{what}; several may be given, and the flag may be repeated"
        group.add_argument(*flags, nargs="+", action="extend", default=[], metavar=metavar, help=told)
    group.add_argument(
        "-m", "--max-eval-instances", type=int, metavar="N", help="evaluate at most this many instances of a run"
    )


def add_policy_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags that `policy_from_flags` reads."""
    group.add_argument("--policy", help="a shipped policy's name, a YAML file, or auto (default)")
    add_memory_flags(group)
    group.add_argument(
        "--pad-to-seq-len", type=_pad, metavar="N", help="pad every prompt to N tokens, or bucket: to a power of two"
    )
    group.add_argument("--gpu-batch-size", type=int, metavar="N", help="largest number of sequences in a micro-batch")
    group.add_argument("--num-gpu-batches", type=int, metavar="N", help="largest number of micro-batches in a sweep")
    group.add_argument(
        "--percent",
        nargs="+",
        type=int,
        metavar="P",
        help="six percents: weights, KV cache and activations, each on GPU and CPU; the rest is on disk",
    )
    group.add_argument("--offload-dir", metavar="DIR", help="directory for what is kept on disk")
    for flag, what in (
        ("--pin-weight", "keep host weights page-locked"),
        ("--cpu-cache-compute", "compute attention to keys and values in host memory on the CPU"),
    ):
        group.add_argument(flag, type=_boolean, nargs="?", const=True, metavar="BOOL", help=what)
    for flag, kind, metavar, what in (
        ("--compress-weight", _weight_codes, "CODES", "compress weights to 4 or 8 bits, or: lossless"),
        ("--compress-cache", _bits, "BITS", "compress the KV cache to 4 or 8 bits"),
    ):
        group.add_argument(flag, type=kind, nargs="?", const=True, metavar=metavar, help=what)
    # FlexGen's scripts use these abbreviations of two flags, which must not become ambiguous by --cpu-memory.
    group.add_argument("--cpu", dest="cpu_cache_compute", type=_boolean, nargs="?", const=True, help=argparse.SUPPRESS)
    group.add_argument("--gpu", dest="gpu_batch_size", type=int, help=argparse.SUPPRESS)


def add_memory_flags(group: argparse._ActionsContainer) -> None:
    """Add the limits of GPU and host memory, which have these names in every command."""
    group.add_argument(
        "--gpu-memory", metavar="SIZE", help="limit of what torch reserves on the GPU: 16GB, 16GiB or 16 (GiB)"
    )
    group.add_argument("--cpu-memory", metavar="SIZE", help="limit of what is placed in host memory, written likewise")


def add_stop_flag(parser: Parser) -> None:
    """Add the flag of commands that store answers, and may therefore end before they are finished."""
    parser.group("what to run").add_argument(
        "--stop-before",
        type=moment,
        metavar="TIME",
        help="end before TIME (23:30, or 2026-12-24T06:00) with exit code 75; run the same command to continue",
    )


def add_length_flag(parser: argparse._ActionsContainer) -> None:
    """Add the flag that sets HELM's max_sequence_length."""
    parser.add_argument(
        "--max-sequence-length",
        type=int,
        metavar="N",
        help="most tokens of prompt and answer together (default: the model's context window)",
    )


def add_shaping_flags(parser: argparse._ActionsContainer) -> None:
    """Add the flags that `shaping_from_flags` reads."""
    parser.add_argument(
        "--apply-chat-template",
        choices=tuple(CHAT_TEMPLATE),
        default="auto",
        help="render prompts through the tokenizer's chat template (default: auto, if it has one)",
    )
    parser.add_argument(
        "--chat-template-kwargs",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="arguments of the chat template, such as enable_thinking=false or reasoning_effort=high",
    )
    parser.add_argument(
        "--reasoning",
        nargs="+",
        metavar="STYLE",
        help="how the model marks its thinking, which is not scored: auto (default), none, think, mistral, "
        "harmony, or the two strings around it",
    )
    parser.add_argument(
        "--thinking-budget", type=int, metavar="N", help="end the thinking after N tokens; 0 ends it at once"
    )
    parser.add_argument(
        "--sampling",
        choices=("entry", "model"),
        help="take sampling settings from the run entry (default) or the model's generation_config.json",
    )


def shaping_from_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return the args of a deployment that shape its answers, as far as flags give them; `ConfigError` for bad ones."""
    found: dict[str, Any] = {
        "apply_chat_template": CHAT_TEMPLATE[args.apply_chat_template],
        "chat_template_kwargs": dict(map(_named_value, args.chat_template_kwargs)) or None,
        "reasoning": _reasoning(args.reasoning),
        "thinking_budget": args.thinking_budget,
        "sampling": args.sampling,
    }
    return {name: value for name, value in found.items() if value is not None}


def _named_value(text: str) -> tuple[str, Any]:
    name, is_given, value = text.partition("=")
    if not name or not is_given:
        raise ConfigError(f"--chat-template-kwargs {text}: write NAME=VALUE, such as enable_thinking=false")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--chat-template-kwargs {text}: the value is no YAML; put a text in quotes") from None


def _reasoning(words: Sequence[str] | None) -> str | dict[str, str] | None:
    if words is None or len(words) == 1:
        return words[0] if words else None
    if len(words) > 2:
        raise ConfigError(
            f"--reasoning {' '.join(words)}: give a style, or the two strings that thinking stands between"
        )
    from flexgen_helm.helm.requests.thinking import WORDS  # loads transformers

    if words[0] in WORDS:
        raise ConfigError(f"--reasoning {' '.join(words)}: {words[0]} is a style by itself; put {words[1]} before it")
    return {"begin": words[0], "end": words[1]}


def policy_from_flags(args: argparse.Namespace) -> PolicySpec | None:
    """Return the policy that `--policy` and the flags define, in the form of a deployment's `args`.

    None if no flag is given; a command may have only some of them. Raises `ConfigError` for an invalid policy.
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
            "gpu-memory",
            "cpu-memory",
        )
        if (value := getattr(args, key.replace("-", "_"), None)) is not None
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
    """Parse the command line of `run` (or of another `run_parser`); `ConfigError` for invalid values."""
    args = (parser or run_parser()).parse_args(arguments)
    if args.suite is not None:
        check_suite_name(args.suite)
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


def names_entries(args: argparse.Namespace) -> bool:
    """Whether the command line names anything to run."""
    return bool(args.conf_paths or args.run_entries or args.run_specs or args.description)


def _boolean(text: str) -> bool:
    if text.lower() in ("1", "true", "t", "yes", "y"):
        return True
    if text.lower() in ("0", "false", "f", "no", "n"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither 1 nor 0")


def _bits(text: str) -> bool | int:
    return int(text) if text in ("4", "8") else _boolean(text)


def _weight_codes(text: str) -> bool | int | str:
    return text if text == "lossless" else _bits(text)


def _pad(text: str) -> int | str:
    if text == "bucket":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is neither a number of tokens nor "bucket"') from None
