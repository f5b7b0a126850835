"""How close sweeps come to the disk's rate: `python -m benchmarks.disk_tier --shape opt-30b --offload-dir DIR`.

Opens random weights of a shape with a part of them on disk, and runs requests for one token that share most of their
prompt, in one sweep at a time. The limit is the time that a plain reader takes for the same bytes of the same files, by
direct reads with as many threads, right before and right after each run. Also records how much the page cache grew,
which direct reads do not change (other processes may).
"""

from __future__ import annotations

import argparse
import mmap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import Policy
from engine.memory.disk.file import PIECE_BYTES, READERS, Request, requests_of
from flexgen_helm.commands.bench import timed
from flexgen_helm.planning.dummy import open_dummy, shape_name
from flexgen_helm.planning.model_sizes import sizes_of
from flexgen_helm.planning.record import write_record
from flexgen_helm.planning.roofline import Workload

if TYPE_CHECKING:
    from engine import Engine

ROOT = Path(__file__).resolve().parent.parent


def page_cache_bytes() -> int:
    """Bytes of files in the system's page cache (Linux)."""
    with open("/proc/meminfo", encoding="ascii") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("Cached:"))


def policy_of(options: argparse.Namespace, disk: float) -> Policy:
    """A policy with `disk` percent of the weights on disk, a given share on the device, and the rest in host memory."""
    mapping = {
        "weights": {"gpu": options.gpu, "cpu": 100 - options.gpu - disk, "disk": disk},
        "kv-cache": {"gpu": 100, "cpu": 0},
        "activations": {"gpu": 100, "cpu": 0},
        "offload-dir": str(options.offload_dir),
        "device": options.device,
        "gpu-memory": options.gpu_memory,
        "cpu-memory": options.cpu_memory,
    }
    return Policy.from_mapping({key: value for key, value in mapping.items() if value is not None})


def requests_for(engine: Engine) -> list[Request]:
    """Direct reads of all weights that are on disk."""
    placed = engine.parts.weights.placed.values()
    return requests_of(span for unit in placed for span in unit.disk_spans(unit.part.first, unit.part.end))


def plain_read_s(requests: list[Request]) -> float:
    """Time `requests` alone, read by as many threads as the engine uses."""
    memory = memoryview(mmap.mmap(-1, PIECE_BYTES))  # all threads read into the same memory, which nobody uses
    start = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(lambda each: each.file.read(each.first, memory, each.end - each.first), requests):
            pass
    return time.perf_counter() - start


def measure(shape: str, policy: Policy, load: Workload, runs: int) -> dict[str, Any]:
    """Time `runs` calls of the workload, and a plain reader of the same bytes around each; seconds, with the ratio."""
    start, cached = time.perf_counter(), page_cache_bytes()
    with open_dummy(shape, policy) as engine:
        load_s, cached_by_load = time.perf_counter() - start, page_cache_bytes() - cached
        timed(engine, load, seed=1)  # allocates the memory that the workload needs
        requests, cached = requests_for(engine), page_cache_bytes()
        plain, times = [plain_read_s(requests)], []
        for seed in range(2, 2 + runs):
            times.append(timed(engine, load, seed))
            plain.append(plain_read_s(requests))
        grown = page_cache_bytes() - cached
        disk_bytes, read_ahead_bytes = sizes_of(engine).disk_bytes, engine.plan.read_ahead_bytes
    limits = [sweeps * (plain[run] + plain[run + 1]) / 2 for run, (_, sweeps) in enumerate(times)]
    return {
        "policy": policy.as_mapping(),
        "load_s": load_s,
        "page_cache_growth_by_load_bytes": cached_by_load,
        "disk_bytes_a_sweep": disk_bytes,
        "plain_reader_bytes": sum(each.num_bytes for each in requests),
        "plain_reader_s": plain,
        "read_ahead_bytes": read_ahead_bytes,
        "seconds": [seconds for seconds, _ in times],
        "sweeps": [sweeps for _, sweeps in times],
        "limit_s": limits,
        "over_limit": [
            seconds / limit if disk_bytes else None for (seconds, _), limit in zip(times, limits, strict=True)
        ],
        "page_cache_growth_bytes": grown,
    }


def main() -> None:
    """Measure the engine at each share and a plain reader; print and record both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-30b")
    parser.add_argument("--weights", type=float, nargs="+", default=[50.0], help="percents of the weights on disk")
    parser.add_argument("--gpu", type=float, default=0.0, help="percent of the weights on the device")
    parser.add_argument("--jobs", type=int, default=100, help="requests at once")
    parser.add_argument("--prompt", type=int, nargs=2, default=(400, 100), metavar=("SHARED", "OWN"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--offload-dir", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--gpu-memory")
    parser.add_argument("--cpu-memory")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    load = Workload(1, options.jobs, *options.prompt, 1)
    rows = []
    for disk in options.weights:
        policy = policy_of(options, disk)
        row = {"disk_percent": disk, **measure(options.shape, policy, load, options.runs)}
        rows.append(row)
        print(f"{disk:g} % on disk, {row['disk_bytes_a_sweep'] / 1e9:.2f} GB a sweep; loaded in {row['load_s']:.1f} s")
        for seconds, limit, over in zip(row["seconds"], row["limit_s"], row["over_limit"], strict=True):
            told = "no disk" if over is None else f"{over:.2f} x a plain reader"
            print(f"  {seconds:.3f} s, limit {limit:.3f} s: {told}", flush=True)
        print(f"  the page cache grew by {row['page_cache_growth_bytes'] / 1e6:.0f} MB", flush=True)
    content = {"shape": options.shape, "row": str(load), "rows": rows}
    print(write_record(f"disk-tier-{shape_name(options.shape)}", content, options.out))


if __name__ == "__main__":
    main()
