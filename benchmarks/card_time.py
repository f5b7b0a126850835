"""Where a GPU's time goes: matrix products, attention, and the operations between them.

    python -m benchmarks.card_time [--shape llama-3-8b] [--changes '{"num_hidden_layers": 8}'] [--rows suite …]

A workload is written as for `flexgen-helm bench`; `suite` is twenty runs of 100 requests each, with prompts of 350 to
1,500 shared and 40 to 140 own tokens. Each is run twice after a rehearsal, without being recorded, and compared with
the least time that its arithmetic takes; then once more, recorded by torch.profiler from outside, with the times of
kernels summed by purpose.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError
from engine.job import Job, Sampling
from flexgen_helm.commands.bench import bench_policy, rates_of
from flexgen_helm.planning.dummy import open_dummy, shape_name
from flexgen_helm.planning.model_sizes import sizes_of
from flexgen_helm.planning.record import write_record
from flexgen_helm.planning.roofline import Workload

if TYPE_CHECKING:
    from engine import Engine
    from flexgen_helm.planning.roofline import Rates
    from flexgen_helm.planning.sizes import Sizes

ROOT = Path(__file__).resolve().parent.parent
SUITE = "suite"
_KINDS = {
    "attention": ("flash", "fmha"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitkreduce", "gemv"),
    "copies": ("memcpy", "memset"),
}
"""Purpose of a kernel by parts of its lower-case name; the first match counts."""
_BETWEEN = "between"


@dataclass(frozen=True)
class Asked:
    """Prompts, by run: the length of the shared prefix, and the lengths of the requests' own parts."""

    runs: tuple[tuple[int, tuple[int, ...]], ...]

    @classmethod
    def parse(cls, text: str) -> Asked:
        """Parse a workload with one new token per request, or `suite`; raises `ConfigError` for any other text."""
        if text == SUITE:
            rng = random.Random(0)
            return cls(
                tuple((rng.randint(350, 1500), tuple(rng.randint(40, 140) for _ in range(100))) for _ in range(20))
            )
        load = Workload.parse(text)
        if load.new != 1:
            raise ConfigError(f"workload {text!r}: only requests of one new token are counted here; end it with :1")
        return cls(((load.shared, (load.own,) * load.num_jobs),) * load.num_runs)

    def jobs(self, vocabulary: int, seed: int) -> list[Job]:
        """Make requests for one new token with random prompts."""
        rng = random.Random(seed)
        jobs = []
        for shared, lengths in self.runs:
            prefix = [rng.randrange(5, vocabulary) for _ in range(shared)]
            jobs += [
                Job(
                    prompt=prefix + [rng.randrange(5, vocabulary) for _ in range(own)],
                    max_new_tokens=1,
                    sampling=Sampling(temperature=1.0, seed=index),
                )
                for index, own in enumerate(lengths)
            ]
        return jobs

    @property
    def num_tokens(self) -> int:
        """Prompt tokens to compute, with a shared prefix computed once."""
        return sum(shared + sum(lengths) for shared, lengths in self.runs)

    @property
    def num_pairs(self) -> int:
        """Pairs of a query and a visible key for those tokens."""
        return sum(
            shared * (shared + 1) // 2 + sum(own * shared + own * (own + 1) // 2 for own in lengths)
            for shared, lengths in self.runs
        )

    def product_flop(self, sizes: Sizes) -> float:
        """Floating-point operations of matrix products with weights."""
        requests = sum(len(lengths) for _, lengths in self.runs)
        return 2.0 * sizes.layer_parameters * self.num_tokens + 2.0 * sizes.head_parameters * requests

    def attention_flop(self, sizes: Sizes) -> float:
        """Floating-point operations of attention."""
        return 2.0 * sizes.attention_width * self.num_pairs


def kind_of(name: str) -> str:
    """The purpose of a kernel, by its name."""
    name = name.lower()
    return next((kind for kind, parts in _KINDS.items() if any(part in name for part in parts)), _BETWEEN)


def summed(events: Iterable[tuple[str, float]]) -> dict[str, Any]:
    """Sum milliseconds and launches by purpose, and by kernel, from names and microseconds."""
    kinds: dict[str, list[float]] = {}
    kernels: dict[str, list[float]] = {}
    for name, duration in events:
        for table, key in ((kinds, kind_of(name)), (kernels, name[:120])):
            entry = table.setdefault(key, [0.0, 0])
            entry[0] += duration / 1e3
            entry[1] += 1
    order = dict(sorted(kernels.items(), key=lambda item: -item[1][0]))
    return {"kinds_ms": kinds, "kernels_ms": order}


def recorded(engine: Engine, jobs: list[Job]) -> dict[str, Any]:
    """Profile a call, from its first to its last kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        engine.run(jobs)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        trace = json.loads(file.read_text())
    events = [
        (event["name"], float(event["ts"]), float(event.get("dur", 0)))
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    found = summed((name, duration) for name, _, duration in events)
    busy, end, gaps = 0.0, 0.0, []
    for _, start, duration in sorted(events, key=lambda event: event[1]):
        if end and start - end > 1000:
            gaps.append((start - end) / 1e3)
        busy += max(0.0, start + duration - max(end, start))
        end = max(end, start + duration)
    wall = end - min((start for _, start, _ in events), default=0.0)
    return {"wall_ms": wall / 1e3, "idle_ms": (wall - busy) / 1e3, "gaps_ms": gaps, **found}


def measure(engine: Engine, text: str, rates: Rates | None, records: bool) -> dict[str, Any]:
    """Time a workload; returns its seconds, its least time, and where the time went."""
    asked, sizes, vocabulary = Asked.parse(text), sizes_of(engine), engine.parts.model.vocab_size
    engine.run(asked.jobs(vocabulary, 1))
    sweeps: list[Any] = []
    engine.observer = sweeps.append
    seconds = []
    for seed in (2, 3):
        jobs, start = asked.jobs(vocabulary, seed), time.perf_counter()
        engine.run(jobs)
        seconds.append(time.perf_counter() - start)
    engine.observer = None
    products, attention = asked.product_flop(sizes), asked.attention_flop(sizes)
    found: dict[str, Any] = {
        "rows": text,
        "tokens": asked.num_tokens,
        "product_flop": products,
        "attention_flop": attention,
        "all_seconds": seconds,
        "seconds": min(seconds),
        "sweeps": [asdict(sweep) for sweep in sweeps],
    }
    if rates is not None:
        found["limit_s"] = (products + attention) / rates.flop_s
        found["fraction"] = found["limit_s"] / found["seconds"]
    if records and engine.parts.arena.device.type == "cuda":
        found["recorded"] = recorded(engine, asked.jobs(vocabulary, 4))
        spent = found["recorded"]["kinds_ms"].get("products", [0.0])[0]
        found["product_tflop_s"] = products / spent / 1e9 if spent else None
    return found


def told(found: dict[str, Any]) -> str:
    """Format a workload's lines of the printed report."""
    lines = [f"{found['rows']}: {found['seconds']:.3f} s"]
    if "fraction" in found:
        lines[0] += f", {found['fraction']:.1%} of the arithmetic's {found['limit_s']:.3f} s"
    lines[0] += f"; host {sum(sweep['host_s'] for sweep in found['sweeps']) / 2:.3f} s"
    if recording := found.get("recorded"):
        lines.append(f"  recorded: {recording['wall_ms']:.0f} ms, idle {recording['idle_ms']:.0f} ms")
        lines.append(f"  gaps above 1 ms: {[round(gap, 1) for gap in recording['gaps_ms']]}")
        if found["product_tflop_s"]:
            lines[-1] += f"; products at {found['product_tflop_s']:.0f} TFLOP/s"
        kinds = sorted(recording["kinds_ms"].items(), key=lambda item: -item[1][0])
        lines += [f"  {kind:>10} {ms:9.1f} ms {count:7d} launches" for kind, (ms, count) in kinds]
        kernels = [item for item in recording["kernels_ms"].items() if kind_of(item[0]) != "products"][:14]
        lines += [f"    {ms:9.1f} ms {count:7d}  {name[:100]}" for name, (ms, count) in kernels]
    return "\n".join(lines)


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--changes", type=json.loads, default={}, help="of the shape, a JSON object")
    parser.add_argument("--rows", nargs="+", default=[SUITE])
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--gpu-memory")
    parser.add_argument("--plain", action="store_true", help="record nothing by torch.profiler, measure no rates")
    parser.add_argument("--name", help="of the record; default: card-time and the shape")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    policy = bench_policy(options.policy, options.gpu_memory, None)
    with tempfile.TemporaryDirectory() as folder:
        shape = options.shape
        if options.changes:
            file = Path(folder) / f"{shape_name(shape)}.json"
            file.write_text(json.dumps({"shape": shape, **options.changes}), encoding="utf-8")
            shape = str(file)
        rates = None if options.plain else rates_of(policy, shape)
        with open_dummy(shape, policy) as engine:
            print(f"{options.shape} {options.changes}: {engine.plan.limits}", flush=True)
            content: dict[str, Any] = {
                "shape": options.shape,
                "changes": options.changes,
                "policy": policy.as_mapping(),
                "limits": asdict(engine.plan.limits),
                "rates": None if rates is None else asdict(rates),
                "rows": [],
            }
            for text in options.rows:
                content["rows"].append(measure(engine, text, rates, not options.plain))
                print(told(content["rows"][-1]), flush=True)
                print(write_record(options.name or f"card-time-{shape_name(options.shape)}", content, options.out))


if __name__ == "__main__":
    main()
