"""`flexgen-helm bench`: times the engine on random weights of a real shape, compared with the machine's limits.

A workload is written RUNSxJOBSxSHARED+OWN:NEW: so many runs of so many requests, each with a prompt of tokens shared
within the run plus tokens of its own, and so many tokens to generate. Rates are measured in the same call. Imports no
HELM.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError, EngineError
from engine.policy import Policy, read_policy_yaml
from flexgen_helm.planning.model_sizes import sizes_of
from flexgen_helm.planning.roofline import Workload, least_seconds, measure_rates, work_of
from flexgen_helm.terminal.errors import RunFailed
from flexgen_helm.terminal.footprint import Footprint
from flexgen_helm.terminal.parser import Parser

if TYPE_CHECKING:
    from engine.engine import Engine
    from flexgen_helm.planning.roofline import Rates

ROWS = ("1x64x0+512:32", "1x100x400+100:1", "10x100x400+100:1")
"""FlexGen's own workload, one few-shot run, and ten of them."""
CURVE = (1, 4, 16, 64, 256)

_COLUMNS = (
    ("workload", 20, lambda row: row["row"]),
    ("seconds", 9, lambda row: f"{row['seconds']:.3f}"),
    ("limit", 9, lambda row: f"{row['limit_s']:.3f}"),
    ("bound by", 14, lambda row: row["bound"]),
    ("reached", 8, lambda row: f"{row['fraction']:.0%}"),
    ("sweeps", 7, lambda row: str(row["sweeps"])),
    ("requests/s", 11, lambda row: f"{row['requests_s']:.2f}"),
    ("tokens/s", 9, lambda row: f"{row['new_tokens_s']:.1f}"),
)


EXAMPLES = (
    "flexgen-helm bench --shape opt-6.7b --gpu-memory 16GB",
    "flexgen-helm bench --shape ./my-model --policy all-on-cpu --rows 1x100x400+100:1 --curve 1 16 256",
)


def bench_parser() -> Parser:
    """The command line of `flexgen-helm bench`."""
    from flexgen_helm.planning.shapes import SHAPES

    parser = Parser(prog="flexgen-helm bench", description=__doc__, examples=EXAMPLES)
    parser.group("model").add_argument(
        "--shape",
        default="opt-30b",
        help=f"{', '.join(SHAPES)}, or a model directory or config.json, of which only the shape is used",
    )
    work = parser.group("what to run")
    work.add_argument("--rows", nargs="+", metavar="RUNSxJOBSxSHARED+OWN:NEW", help="workloads to time, one row each")
    work.add_argument(
        "--curve",
        nargs="*",
        type=int,
        metavar="N",
        help=f"time 512 prompt and 32 new tokens for each number of sequences (default: {' '.join(map(str, CURVE))})",
    )
    policy = parser.group("policy")
    policy.add_argument("--policy", default="auto", help="a shipped policy's name, a YAML file, or auto (default)")
    policy.add_argument("--gpu-memory", metavar="SIZE", help="limit of what torch reserves on the GPU, such as 16GB")
    policy.add_argument(
        "--percent", nargs=6, type=int, metavar="P", help="FlexGen's six percents, which override the policy's"
    )
    output = parser.group("output")
    output.add_argument(
        "--out",
        type=Path,
        default=Path("benchmark_output/bench"),
        help="directory of the JSON record (default: %(default)s)",
    )
    output.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def bench(arguments: Sequence[str]) -> int:
    """Time the workloads, print the table and write the record; `EngineError` for bad input."""
    args = bench_parser().parse_args(arguments)
    loads = workloads(args.rows, args.curve)
    policy = bench_policy(args.policy, args.gpu_memory, args.percent)
    from flexgen_helm.planning.dummy import open_dummy, shape_config, shape_name

    shape_config(args.shape)
    Footprint().watch([args.out])
    rates = rates_of(policy, args.shape)
    print("  ".join(f"{name} {value:.4g}" for name, value in asdict(rates).items()), flush=True)
    start = time.perf_counter()
    with open_dummy(args.shape, policy) as engine:
        engine.wait_until_loaded()
        load_s = time.perf_counter() - start
        print(f"{args.shape} filled in {load_s:.1f} s; {engine.plan}", flush=True)
        record: dict[str, Any] = {
            "shape": args.shape,
            "policy": policy.as_mapping(),
            "plan": asdict(engine.plan),
            "rates": asdict(rates),
            "sizes": asdict(sizes_of(engine)),
            "load_s": load_s,
            "rows": [],
        }
        name = f"bench-{shape_name(args.shape)}"
        name += f"-{args.gpu_memory}" if args.gpu_memory else ""
        path = _time_rows(engine, loads, rates, record, name, args.out)
    print(path)
    if failed := [row["error"] for row in record["rows"] if "error" in row]:
        raise RunFailed(f"{len(failed)} of {len(loads)} workloads failed; {failed[0]}")
    return 0


def workloads(rows: Sequence[str] | None, curve: Sequence[int] | None) -> list[Workload]:
    """The workloads of `--rows` and `--curve`; `ROWS` when neither is given."""
    points = () if curve is None else tuple(curve) or CURVE
    texts = [*(ROWS if rows is None and curve is None else rows or ()), *(f"1x{count}x0+512:32" for count in points)]
    return [Workload.parse(text) for text in texts]


def bench_policy(name: str, gpu_memory: str | None, percent: Sequence[int] | None) -> Policy:
    """The policy of `--policy` with the other flags applied."""
    mapping = {} if name == "auto" else dict(read_policy_yaml(name))
    if gpu_memory is not None:
        mapping["gpu-memory"] = gpu_memory
    if percent is not None:
        for key in ("weights", "kv-cache", "activations"):
            mapping.pop(key, None)
        mapping["percent"] = list(percent)
    policy = Policy.from_mapping(mapping, where=f"policy {name} with flags")
    if policy.stages > 1 or not isinstance(policy.device, str):
        raise ConfigError(f"policy {name}: bench times one device; set device to one of them, and leave out stages")
    return policy


def rates_of(policy: Policy, shape: str) -> Rates:
    """Measure the device that `policy` names, in the dtype that `shape` has under it."""
    import torch

    from engine.memory import accelerator
    from engine.planning.hardware import resolve_device, resolve_dtype
    from flexgen_helm.planning.dummy import shape_config

    device, config = resolve_device(policy.device), shape_config(shape)
    wanted = config.get("dtype") or config.get("torch_dtype") or "float16"
    rates = measure_rates(torch.device(device), getattr(torch, resolve_dtype(policy.dtype, wanted, device)))
    gc.collect()
    accelerator.release_memory(torch.device(device))
    accelerator.reset_peak(torch.device(device))
    return rates


def _time_rows(
    engine: Engine, loads: list[Workload], rates: Rates, record: dict[str, Any], name: str, out: Path
) -> Path:
    """Time one workload after the other; the record is rewritten after each."""
    from flexgen_helm.planning.record import write_record

    print("  ".join(f"{title:>{width}}" for title, width, _ in _COLUMNS), flush=True)
    path = out
    for load in loads:
        try:
            row = time_row(engine, load, rates)
            print(table_line(row), flush=True)
        except RunFailed as error:
            row = {"row": str(load), "error": str(error)}
            print(f"{load!s:>20}  {error}", flush=True)
        record["rows"].append(row)
        path = write_record(name, record, out)
    return path


def table_line(row: dict[str, Any]) -> str:
    """One row of the printed table."""
    return "  ".join(f"{shown(row):>{width}}" for _, width, shown in _COLUMNS)


def time_row(engine: Engine, load: Workload, rates: Rates) -> dict[str, Any]:
    """Time `load` once, after a rehearsal that allocates the memory it needs; seconds, and the least possible."""
    rehearsal_s, _ = timed(engine, load.rehearsal(engine.plan.limits.seats), seed=1)
    seconds, sweeps = timed(engine, load)
    cache_crosses = not engine.policy.cpu_cache_compute
    work = work_of(load, sizes_of(engine), engine.plan, cache_crosses=cache_crosses, most_sweeps=sweeps)
    least = least_seconds(work, rates)
    bound = max(least, key=lambda resource: least[resource])
    return {
        "row": str(load),
        "seconds": seconds,
        "rehearsal_s": rehearsal_s,
        "sweeps": sweeps,
        "limit_s": least[bound],
        "bound": bound,
        "least_s": least,
        "work": asdict(work),
        "fraction": least[bound] / seconds,
        "requests_s": load.num_requests / seconds,
        "new_tokens_s": load.num_requests * load.new / seconds,
        "device_reserved_bytes": _device_reserved(engine),
        "placed_bytes": engine.placed_bytes(),
    }


def timed(engine: Engine, load: Workload, seed: int = 0) -> tuple[float, int]:
    """The seconds and sweeps of one call; `RunFailed` when a request ends otherwise than expected."""
    jobs = load.jobs(engine.parts.model.vocab_size, seed)
    before, start = engine.num_sweeps, time.perf_counter()
    try:
        done = engine.run(jobs)
    except EngineError as error:
        raise RunFailed(f"workload {load}: {error}") from None
    seconds = time.perf_counter() - start
    for completion in done:
        if completion.error is not None:
            raise RunFailed(f"workload {load}: {completion.error}")
        if len(completion.tokens) != load.new:
            raise RunFailed(f"workload {load}: a request ended after {len(completion.tokens)} tokens")
    return seconds, engine.num_sweeps - before


def _device_reserved(engine: Engine) -> int:
    """The most memory that torch has reserved on the device since the rates were measured."""
    from engine.memory import accelerator

    return accelerator.peak_memory(engine.parts.arena.device)
