"""Whole mixture-of-experts models in little device memory: one row per process, compared with its limits.

    python -m benchmarks.mixtures ROW [--rows RUNSxJOBSxSHARED+OWN:NEW] [--tiny] [--out DIR]

Each row names a shape in its published format, the device memory and a workload; weights are random. The limits are the
bytes that cross the link both ways (weights, keys and values, states, hidden states), those that the device's memory
reads, and the floating-point operations, each divided by a rate measured here. Sweeps in which all requests decode are
reported separately: their limit is what crosses the link to the device. `--tiny` tries a row on any machine: a few
small layers, and a few short requests.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen_helm.commands.bench import bench_policy, rates_of, timed
from flexgen_helm.planning.dummy import open_dummy
from flexgen_helm.planning.model_sizes import sizes_of
from flexgen_helm.planning.record import write_record
from flexgen_helm.planning.roofline import Workload, least_seconds, work_of
from flexgen_helm.planning.shapes import SHAPES

if TYPE_CHECKING:
    from engine import Engine
    from engine.schedule.timing import SweepTiming
    from flexgen_helm.planning.roofline import Rates

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """A shape with its changes, the device memory, and the workload."""

    shape: str
    gpu_memory: str
    load: str
    changes: dict[str, Any] = field(default_factory=dict)


_LAYERS = {"num_hidden_layers": 8, "first_k_dense_replace": 0}
ROWS = {
    "qwen3-30b-a3b-one-run": Row("qwen3-30b-a3b", "16GB", "1x100x400+100:1"),
    "qwen3-30b-a3b-ten-runs": Row("qwen3-30b-a3b", "16GB", "10x100x400+100:1"),
    "gpt-oss-120b-ten-runs": Row("gpt-oss-120b", "16GB", "10x100x400+100:1"),
    "gpt-oss-120b-decode": Row("gpt-oss-120b", "16GB", "1x512x0+512:32"),
    "mixtral-8x7b-decode": Row("mixtral-8x7b", "24GB", "1x512x0+512:32"),
    "qwen3-next-80b-decode": Row("qwen3-next-80b-a3b", "16GB", "1x256x0+512:32"),
    "deepseek-v3-8-layers": Row("deepseek-v3", "24GB", "1x10x0+1000:1", _LAYERS),
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 16,
    "num_local_experts": 16,
    "n_routed_experts": 16,
    "num_hidden_layers": 4,
    "vocab_size": 512,
}
"""The small sizes that `--tiny` uses for those that a shape has."""
TINY_LOAD = Workload(1, 4, 0, 20, 4)


def measure(engine: Engine, load: Workload, rates: Rates) -> dict[str, Any]:
    """Time `load` after a rehearsal: in total, sweeps with prompts, and sweeps that only decode, with limits."""
    rehearsal_s, _ = timed(engine, load.rehearsal(engine.plan.limits.seats), seed=1)
    sweeps: list[SweepTiming] = []
    engine.observer = sweeps.append
    seconds, num_sweeps = timed(engine, load)
    engine.observer = None
    sizes, crosses = sizes_of(engine), not engine.policy.cpu_cache_compute
    work = work_of(load, sizes, engine.plan, cache_crosses=crosses, most_sweeps=num_sweeps)
    least = least_seconds(work, rates)
    bound = max(least, key=lambda resource: least[resource])
    found = {
        "rows": str(load),
        "seconds": seconds,
        "least_s": least,
        "bound": bound,
        "fraction": least[bound] / seconds,
        "requests_s": load.num_requests / seconds,
        "rehearsal_s": rehearsal_s,
        "work": asdict(work),
        "sweeps": [asdict(each) for each in sweeps],
    }
    prompts, decoding = (
        [each for each in sweeps if each.prefill_rows],
        [each for each in sweeps if not each.prefill_rows],
    )
    found["prompt_tokens_s"] = sum(each.prefill_rows for each in prompts) / _seconds(prompts)
    if decoding:
        rows = sum(each.decode_rows for each in decoding)
        cached = (work.to_device_bytes - work.sweeps * sizes.streamed_bytes) * rows / sum(s.decode_rows for s in sweeps)
        limit = (len(decoding) * sizes.streamed_bytes + cached) / rates.to_device_bytes_s
        tokens = sum(each.new_tokens for each in decoding)
        told = {"sweeps": len(decoding), "seconds": _seconds(decoding), "tokens_s": tokens / _seconds(decoding)}
        found["decoding"] = {**told, "link_s": limit, "fraction": limit / _seconds(decoding)}
    return found


def _seconds(sweeps: Sequence[SweepTiming]) -> float:
    return sum(each.host_s + each.sweep_s for each in sweeps)


def run(name: str, row: Row, load: Workload, out: Path) -> Path:
    """Build the shape, time the row, print and record it."""
    begun = time.perf_counter()
    policy = bench_policy("auto", row.gpu_memory, None)
    with tempfile.TemporaryDirectory() as folder:
        shape = row.shape
        if row.changes:
            file = Path(folder) / f"{name}.json"
            file.write_text(json.dumps({"shape": row.shape, **row.changes}), encoding="utf-8")
            shape = str(file)
        rates = rates_of(policy, shape)
        print("  ".join(f"{key} {value:.4g}" for key, value in asdict(rates).items()), flush=True)
        with open_dummy(shape, policy) as engine:
            filled_s = time.perf_counter() - begun
            print(f"{shape} filled after {filled_s:.1f} s; {engine.plan}", flush=True)
            found = measure(engine, load, rates)
            content = {
                "shape": row.shape,
                "changes": row.changes,
                "policy": policy.as_mapping(),
                "plan": asdict(engine.plan),
                "rates": asdict(rates),
                "filled_s": filled_s,
                **found,
            }
    print(f"{load}: {found['seconds']:.2f} s, {found['fraction']:.2f} of the limit ({found['bound']})")
    print(
        f"{found['requests_s']:.1f} requests/s; {found['prompt_tokens_s']:.0f} prompt tokens/s in sweeps that have them"
    )
    if told := found.get("decoding"):
        print(f"decoding: {told['tokens_s']:.1f} tokens/s, {told['fraction']:.2f} of the link's time")
    return write_record(f"mixture-{name}", content, out)


def main() -> None:
    """Time one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--rows", type=Workload.parse, help="what is asked, in place of the row's")
    parser.add_argument("--gpu-memory", help="in place of the row's")
    parser.add_argument("--tiny", action="store_true", help="a few small layers, and a few short requests")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    row = ROWS[options.row]
    row = replace(row, gpu_memory=options.gpu_memory or row.gpu_memory)
    name, load = options.row, Workload.parse(row.load)
    if options.tiny:
        name, load = f"{name}-tiny", TINY_LOAD
        row = replace(row, changes=row.changes | {key: TINY[key] for key in TINY.keys() & SHAPES[row.shape].keys()})
    print(run(name, row, options.rows or load, options.out))


if __name__ == "__main__":
    main()
