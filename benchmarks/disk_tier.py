"""How near sweeps come to the disk's rate: `python -m benchmarks.disk_tier --shape opt-30b --offload-dir DIR`.

Opens random weights of a shape with so many percent of them on disk, and runs requests of one token that share most of
their prompt: one sweep each time. The limit is the bytes that a sweep reads from disk over the disk's rate, measured
right before by direct reads of a file of its own in the same directory. Also looks at how much the page cache grew,
which direct reads leave as it is (other processes do not).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from engine import Policy
from engine.measuring.disk_rates import disk_rates
from engine.policy import parse_bytes
from flexgen_helm.commands.bench import timed
from flexgen_helm.planning.dummy import open_dummy, shape_name
from flexgen_helm.planning.model_sizes import sizes_of
from flexgen_helm.planning.record import write_record
from flexgen_helm.planning.roofline import Workload

ROOT = Path(__file__).resolve().parent.parent


def page_cache_bytes() -> int:
    """What the system holds of files in memory (Linux)."""
    with open("/proc/meminfo", encoding="ascii") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("Cached:"))


def policy_of(options: argparse.Namespace, disk: float) -> Policy:
    """`disk` percent of the weights on disk, the device's share on the device, the rest in host memory."""
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


def measure(shape: str, policy: Policy, load: Workload, runs: int, read_bytes_s: float) -> dict[str, Any]:
    """Time `runs` calls of the workload; seconds, and the least there could be."""
    start, cached = time.perf_counter(), page_cache_bytes()
    with open_dummy(shape, policy) as engine:
        load_s, cached_by_load = time.perf_counter() - start, page_cache_bytes() - cached
        timed(engine, load, seed=1)  # claims the memory that it needs
        disk_bytes, cached = sizes_of(engine).disk_bytes, page_cache_bytes()
        times = [timed(engine, load, seed) for seed in range(2, 2 + runs)]
        grown = page_cache_bytes() - cached
        read_ahead_bytes = engine.plan.read_ahead_bytes
    limits = [sweeps * disk_bytes / read_bytes_s for _, sweeps in times]
    return {
        "policy": policy.as_mapping(),
        "load_s": load_s,
        "page_cache_growth_by_load_bytes": cached_by_load,
        "disk_bytes_a_sweep": disk_bytes,
        "read_ahead_bytes": read_ahead_bytes,
        "seconds": [seconds for seconds, _ in times],
        "sweeps": [sweeps for _, sweeps in times],
        "limit_s": limits,
        "over_limit": [seconds / limit if limit else None for (seconds, _), limit in zip(times, limits, strict=True)],
        "page_cache_growth_bytes": grown,
    }


def main() -> None:
    """Measure the disk, then the engine at each share; print and record both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-30b")
    parser.add_argument("--weights", type=float, nargs="+", default=[50.0], help="percents of the weights on disk")
    parser.add_argument("--gpu", type=float, default=0.0, help="percent of the weights on the device")
    parser.add_argument("--jobs", type=int, default=100, help="requests at once")
    parser.add_argument("--prompt", type=int, nargs=2, default=(400, 100), metavar=("SHARED", "OWN"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--offload-dir", type=Path, required=True)
    parser.add_argument("--probe", default="8GB", help="size of the file that the disk is measured with")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--gpu-memory")
    parser.add_argument("--cpu-memory")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    load = Workload(1, options.jobs, *options.prompt, 1)
    rows = []
    for disk in options.weights:
        policy = policy_of(options, disk)
        read, written = disk_rates(str(options.offload_dir), num_bytes=parse_bytes(options.probe, "--probe"), seconds=5)
        print(f"disk reads {read / 1e9:.2f} GB/s, writes {written / 1e9:.2f} GB/s", flush=True)
        row = {
            "disk_percent": disk,
            "disk_read_bytes_s": read,
            "disk_write_bytes_s": written,
            **measure(options.shape, policy, load, options.runs, read),
        }
        rows.append(row)
        print(f"{disk:g} % on disk, {row['disk_bytes_a_sweep'] / 1e9:.2f} GB a sweep; loaded in {row['load_s']:.1f} s")
        for seconds, limit, over in zip(row["seconds"], row["limit_s"], row["over_limit"], strict=True):
            print(f"  {seconds:.3f} s, limit {limit:.3f} s: {'no disk' if over is None else f'{over:.2f} x the limit'}")
        print(f"  the page cache grew by {row['page_cache_growth_bytes'] / 1e6:.0f} MB", flush=True)
    content = {"shape": options.shape, "row": str(load), "rows": rows}
    print(write_record(f"disk-tier-{shape_name(options.shape)}", content, options.out))


if __name__ == "__main__":
    main()
