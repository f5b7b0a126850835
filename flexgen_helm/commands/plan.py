"""`flexgen-helm plan`: finds the policy with the least estimated time for a workload, or estimates run entries.

A workload is written RUNSxJOBSxSHARED+OWN:NEW, as for `bench`. The estimate is for this machine, as measured by `doctor
--profile`, or for the machine of another profile. With files of run entries in place of --shape, as for `sweep`, HELM
makes all of their requests, and the command estimates their time, tokens, bytes and memory; `flexgen-helm plan CONF
--help` shows the flags for that.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from engine.errors import ConfigError
from engine.memory.tiers import TIERS
from engine.policy import Policy
from engine.reading import parse_bytes
from flexgen_helm.pictures.figure import check_picture
from flexgen_helm.planning.forecast import REACHED
from flexgen_helm.planning.roofline import Workload
from flexgen_helm.runs.flags import add_memory_flags, names_entries, parse_run_flags, policy_from_flags, run_parser
from flexgen_helm.terminal.parser import Parser
from flexgen_helm.workers.engine_processes import engine_processes

if TYPE_CHECKING:
    from flexgen_helm.planning.estimate import Estimate
    from flexgen_helm.planning.model_sizes import ModelSizes

_RUNNERS_UP = 2
_NEAR = 10
"""Policies whose percents of the weights on the device differ by less are not listed as alternatives."""


EXAMPLES = (
    "flexgen-helm plan --shape opt-30b --hardware t4 --work 57x100x400+100:1",
    "flexgen-helm plan --shape ./my-model --gpu-memory 16GB --cpu-memory 48GB --write my-policy.yaml",
)


def plan_parser() -> Parser:
    """The command line of `flexgen-helm plan`."""
    from flexgen_helm.planning.shapes import SHAPES

    parser = Parser(prog="flexgen-helm plan", description=__doc__, examples=EXAMPLES)
    parser.group("model").add_argument(
        "--shape", required=True, help=f"a model directory, its config.json, or one of {', '.join(SHAPES)}"
    )
    parser.group("what to run").add_argument(
        "--work",
        default="1x100x400+100:1",
        metavar="RUNSxJOBSxSHARED+OWN:NEW",
        help="the workload (default: %(default)s)",
    )
    limits = parser.group("policy", "the machine, and what of it may be used")
    limits.add_argument(
        "--hardware", metavar="PROFILE", help="a shipped profile's name or a file (default: this machine's)"
    )
    add_memory_flags(limits)
    limits.add_argument("--offload-dir", metavar="DIR", help="allow weights and caches on disk, in DIR")
    limits.add_argument("--disk", default="1TB", metavar="SIZE", help="free space on that disk (default: 1TB)")
    limits.add_argument(
        "--allow-compression", action="store_true", help="also consider 8 and 4 bits, which change scores"
    )
    output = parser.group("output")
    output.add_argument("--write", type=Path, metavar="FILE", help="write the policy to FILE, for --policy")
    told = "draw time and memory over the percents of weights on the GPU, as .png or .svg (needs matplotlib)"
    output.add_argument("--plot", type=Path, metavar="FILE", help=told)
    output.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


ENTRIES_EXAMPLES = (
    "flexgen-helm plan nightly --model facebook/opt-30b --policy opt-30b-t4 -m 100",
    "flexgen-helm plan -r mmlu:subject=anatomy --model ./my-model --hardware t4",
)
ENTRIES_DESCRIPTION = """
Make all requests of run entries, as `sweep` does before it computes, and estimate what they will take: time, tokens,
bytes over the link and from disk, and memory on every tier. Loads no weights, computes nothing, and writes nothing but
the data that scenarios download. Requests that HELM's cache in --local-path can answer are left out; to find these, the
digest of the weight files is computed and stored if the cache holds any answers.
"""
_USELESS = (
    "server_url",
    "runner_class_name",
    "dry_run",
    "skip_instances",
    "cache_instances",
    "skip_completed_runs",
)
"""HELM's flags that have no effect here."""


def entries_parser() -> Parser:
    """The command line of `flexgen-helm plan CONF`; imports neither HELM nor torch."""
    parser = run_parser("flexgen-helm plan", ENTRIES_DESCRIPTION, ENTRIES_EXAMPLES)
    parser.usage = "flexgen-helm plan CONF ... [FLAGS]"
    told = "files of run entries, or names of shipped ones, like -c"
    parser.group("what to run").add_argument("conf", nargs="*", metavar="CONF", help=told)
    parser.group("policy").add_argument(
        "--hardware", metavar="PROFILE", help="a shipped profile's name or a file (default: this machine's)"
    )
    parser.set_defaults(num_threads=1)
    return parser


def plan(arguments: Sequence[str]) -> int:
    """Plan a shape's work, or run entries; `EngineError` for bad input and for work that nothing fits."""
    return _plan_shape(arguments) if names_shape(arguments) else _plan_entries(arguments)


def names_shape(arguments: Sequence[str]) -> bool:
    """Whether a command line, or one that only requests help, is about a shape; else it is about run entries."""
    flags = [each.partition("=")[0] for each in arguments]
    is_shape = any(len(each) > 3 and ("--shape".startswith(each) or "--work".startswith(each)) for each in flags)
    return is_shape or not set(flags) - {"-h", "--help"}


def parse_plan_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line about run entries; `ConfigError` for invalid flags."""
    args = parse_run_flags(arguments, entries_parser())
    args.conf_paths = [*args.conf, *args.conf_paths]
    args.output_path = args.output_path or "benchmark_output"
    if not names_entries(args):
        raise ConfigError("nothing to plan: name --shape, or a file of run entries, such as nightly")
    for name in _USELESS:
        if getattr(args, name):
            raise ConfigError(f"--{name.replace('_', '-')} changes nothing of a plan; leave it out")
    return args


def _plan_entries(arguments: Sequence[str]) -> int:
    """Make the entries' requests, and print what they take."""
    args = parse_plan_flags(arguments)
    policy = policy_from_flags(args)
    if args.hardware is None:
        engine_processes.prepare()  # it says what may be used, and imports what it needs beside HELM
    from engine.planning.hardware_profile import HardwareProfile
    from flexgen_helm.runs.launch import prepare, set_up_logging
    from flexgen_helm.runs.registration import DEPLOYMENTS
    from flexgen_helm.runs.scratch_output import scratch_output
    from flexgen_helm.sweeps.rehearsal import rehearse

    set_up_logging(args)
    profile = None if args.hardware is None else HardwareProfile.load(args.hardware)
    prepared = prepare(args, policy)
    with scratch_output(Path(args.output_path), keeps_downloads=True) as scratch:
        for line in rehearse(prepared.run_specs, scratch, Path(args.local_path), DEPLOYMENTS, profile):
            print(line)
    for note in prepared.notes:
        print(note)
    return 0


def _plan_shape(arguments: Sequence[str]) -> int:
    """Search, print, write the policy and draw."""
    args = plan_parser().parse_args(arguments)
    if args.plot is not None:
        check_picture(args.plot, "--plot")
    load = Workload.parse(args.work)
    base = Policy(
        gpu_memory=None if args.gpu_memory is None else parse_bytes(args.gpu_memory, "--gpu-memory"),
        cpu_memory=None if args.cpu_memory is None else parse_bytes(args.cpu_memory, "--cpu-memory"),
        offload_dir=args.offload_dir,
    )
    from engine.checkpoint.window import window_of
    from engine.planning.hardware_profile import HardwareProfile
    from flexgen_helm.planning.dummy import shape_config
    from flexgen_helm.planning.policy_search import best_of, memory_of, search

    profile = HardwareProfile.load(args.hardware)
    config = shape_config(args.shape)
    dtype = profile.computed_in("auto", config.get("dtype") or config.get("torch_dtype") or "float16")
    window, longest = window_of(config), load.shared + load.own + load.new - 1
    if window is not None and longest > window:
        raise ConfigError(f"--work {load}: sequences of {longest} tokens exceed the model's window of {window}")
    memory = memory_of(profile, base, parse_bytes(args.disk, "--disk"))
    sizes = _sizes(args.shape, dtype)
    found = search(sizes, profile, memory, load, base, compress=args.allow_compression, lossless=True)
    best = best_of(found)
    found = [best, *(each for each in found if each is not best)]
    if args.hardware is not None and base.gpu_memory is None:  # another machine's limit is not found out there
        found = [replace(each, policy=replace(each.policy, gpu_memory=profile.device_memory_bytes)) for each in found]
    print(f"{args.shape} on {profile.device_name}: {load}, {len(found)} policies fit")
    for line in _lines(found[0], load):
        print(line)
    for line in _others(found):
        print(line)
    text = yaml.safe_dump(found[0].policy.as_mapping(), sort_keys=False)
    print("policy:", *(f"  {line}" for line in text.splitlines()), sep="\n")
    if args.write is not None:
        try:
            args.write.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--write {args.write}: {error.strerror}") from None
    if args.plot is not None:
        from flexgen_helm.pictures.plan import draw_plan

        draw_plan(found, best, memory, f"{args.shape} on {profile.device_name}: {load}", args.plot)
    return 0


def _sizes(shape: str, dtype: str) -> ModelSizes:
    """The shipped sizes, or those of the model, which is built for it."""
    from flexgen_helm.planning.dummy import shape_model
    from flexgen_helm.planning.model_sizes import ModelSizes, shipped_sizes

    if found := shipped_sizes(shape, dtype):
        return found
    with tempfile.TemporaryDirectory(prefix="flexgen-plan-") as folder:
        return ModelSizes.of(shape_model(shape, dtype, Path(folder)))


def _lines(found: Estimate, load: Workload) -> Iterator[str]:
    """The time and bottleneck of the best policy, and the placement of the bytes."""
    rate = load.num_requests / found.seconds
    yield (
        f"least time {_s(found.seconds)} in {found.sweeps} sweeps, {rate:.2f} requests/s, "
        f"{rate * load.new:.1f} tokens/s; expect about {_s(found.seconds / REACHED)}"
    )
    for name, times in (("prefill", found.prefill_s), ("decode", found.decode_s)):
        if max(times.values()) > 0:
            by_time = sorted(times, key=lambda resource: -times[resource])
            least = times[by_time[0]] / 1000
            shown = ", ".join(f"{each} {_s(times[each])}" for each in by_time if times[each] >= least)
            yield f"{name}: bound by {by_time[0]} ({shown})"
    if found.hidden_s > 0:
        yield f"prompts are admitted a few at a time: {_s(found.hidden_s)} of transfers to the device happen meanwhile"
    cache, limits = found.plan.cache_budgets, found.plan.limits
    for tier, place in zip(TIERS, ("GPU", "host", "disk"), strict=True):
        held = f"{found.weights[tier] / 1e9:.1f} GB of weights"
        room = f"room for {cache[tier] / 1e9:.1f} GB of keys and values"
        if found.weights[tier] or cache[tier]:
            yield f"{place}: {held}, {room}; {found.held[tier] / 1e9:.1f} GB in use"
    yield f"{found.at_once} sequences at once, micro-batches of up to {limits.rows_per_batch} tokens"


def _others(found: list[Estimate]) -> Iterator[str]:
    """The fastest policies of other kinds, and their bottlenecks."""
    shown = [found[0]]
    for each in found[1:]:
        if all(_is_other(each, seen) for seen in shown):
            shown.append(each)
            longer = each.seconds / found[0].seconds - 1
            why = f"bound by {each.bottleneck}"
            if longer < 0:  # by no more than estimates are wrong
                why += f", in micro-batches of up to {each.plan.limits.rows_per_batch} tokens"
            yield f"runner-up: {_name(each)}: {_s(each.seconds)} ({longer:+.0%}), {why}"
        if len(shown) > _RUNNERS_UP:
            return


def _is_other(one: Estimate, two: Estimate) -> bool:
    codes = [
        (each.policy.compress_weight, each.policy.compress_cache, each.policy.cpu_cache_compute) for each in (one, two)
    ]
    return codes[0] != codes[1] or abs(one.plan.weights.gpu - two.plan.weights.gpu) >= _NEAR


def _name(found: Estimate) -> str:
    weights = found.plan.weights
    parts = [f"{weights.gpu:g} % of the weights on the GPU"]
    parts += [f"{weights.disk:g} % on disk"] if weights.disk else []
    parts += ["attention on the host"] if found.policy.cpu_cache_compute else []
    for name, bits in (("weights", found.policy.compress_weight), ("cache", found.policy.compress_cache)):
        parts += [f"{name} {bits}" if bits == "lossless" else f"{name} in {bits} bits"] if bits else []
    return ", ".join(parts)


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds:.3g} s"
