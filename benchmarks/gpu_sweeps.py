"""Sweeps on a GPU beside their limits: `python benchmarks/gpu_sweeps.py --shape opt-30b --gpu-memory 16GB`.

Limits are measured in the same call: the link by a large page-locked copy, the arithmetic by a large matrix product.
A row's limit is the larger of bytes streamed over the link rate and operations over the GEMM rate.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import report
import torch
from dummy import open_dummy

from engine import Engine, Job, Policy


def link_rate() -> float:
    """Bytes per second of a page-locked copy to the device (median of 5 copies of 1 GiB)."""
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    rates = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        rates.append((1 << 30) / (time.perf_counter() - start))
    return sorted(rates[1:])[2]


def gemm_rate(size: int = 8192) -> float:
    """float16 operations per second of a square matrix product on random numbers (median of 10)."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(2))
    rates = []
    for _ in range(13):
        torch.cuda.synchronize()
        start = time.perf_counter()
        left @ right
        torch.cuda.synchronize()
        rates.append(2 * size**3 / (time.perf_counter() - start))
    return sorted(rates[3:])[5]


def workload(num_runs: int, num_jobs: int, shared: int, own: int, new: int) -> list[Job]:
    """`num_runs` x `num_jobs` jobs of `shared` + `own` prompt tokens, the shared ones equal within a run."""
    rng = random.Random(0)
    jobs = []
    for _ in range(num_runs):
        prefix = [rng.randrange(5, 50000) for _ in range(shared)]
        for _ in range(num_jobs):
            jobs.append(Job(prompt=prefix + [rng.randrange(5, 50000) for _ in range(own)], max_new_tokens=new))
    return jobs


def measure(engine: Engine, jobs: list[Job]) -> tuple[float, int]:
    """Seconds and sweeps of one call."""
    before, start = engine.num_sweeps, time.perf_counter()
    done = engine.run(jobs)
    seconds = time.perf_counter() - start
    assert all(completion.error is None for completion in done), next(c.error for c in done if c.error)
    return seconds, engine.num_sweeps - before


def main() -> None:
    """Measure the rows named on the command line and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="opt-30b")
    parser.add_argument("--gpu-memory", default="16GB")
    parser.add_argument("--out", type=Path, help="directory of the results (default: benchmarks/results)")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=["1x100x400+100:1", "10x100x400+100:1", "1x100x0+500:1"],
        help="runs x jobs x shared+own:new",
    )
    parser.add_argument("--percent", nargs=6, type=int)
    options = parser.parse_args()
    torch.cuda.init()
    limits = {"link_bytes_s": link_rate(), "gemm_flop_s": gemm_rate()}
    torch.cuda.empty_cache()
    print({key: f"{value:.3g}" for key, value in limits.items()}, flush=True)
    mapping: dict[str, Any] = {"device": "cuda", "gpu-memory": options.gpu_memory}
    if options.percent:
        mapping["percent"] = options.percent
    start = time.perf_counter()
    rows = []
    with open_dummy(options.shape, Policy.load(mapping)) as engine:
        load_s = time.perf_counter() - start
        print(f"loaded in {load_s:.1f} s: {engine.plan}", flush=True)
        layer_parameters = sum(store.numel() for name, store in engine._model.state.items() if "layers." in name)
        streamed = sum(placed.num_streamed for placed in engine._weights._by_step)
        for row in options.rows:
            runs, jobs, rest = row.split("x")
            tokens, new = rest.split(":")
            shared, own = tokens.split("+")
            work = workload(int(runs), int(jobs), int(shared), int(own), int(new))
            first_s, _ = measure(engine, work)  # the first time also claims page-locked memory for the KV cache
            seconds, sweeps = measure(engine, work)
            computed = int(runs) * (int(shared) + int(jobs) * (int(own) + int(new) - 1))
            compute_s = 2 * layer_parameters * computed / limits["gemm_flop_s"]
            link_s = sweeps * streamed / limits["link_bytes_s"]
            limit = max(compute_s, link_s)
            rows.append(
                {
                    "row": row,
                    "seconds": seconds,
                    "first_seconds": first_s,
                    "sweeps": sweeps,
                    "limit_s": limit,
                    "compute_s": compute_s,
                    "link_s": link_s,
                    "fraction": limit / seconds,
                    "requests_s": len(work) / seconds,
                    "new_tokens_s": len(work) * int(new) / seconds,
                    "device_reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
                }
            )
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    policy = {"gpu-memory": options.gpu_memory, "percent": options.percent or "auto"}
    name = f"gpu-sweeps-{options.shape}"
    print(report.write(name, {"limits": limits, "policy": policy, "load_s": load_s, "rows": rows}, options.out))


if __name__ == "__main__":
    main()
