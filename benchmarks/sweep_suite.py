"""A suite's requests through one engine in one process: ten runs of 100 requests, with start-up and a time limit.

    python -m benchmarks.sweep_suite --shape opt-30b --gpu-memory 16GB [--rows 10x100x400+100:1] [--rate 95]

Random weights of a real shape, without HELM: like `flexgen-helm sweep`, it makes one call for all runs, whose answers
arrive sweep by sweep. Prints start-up (from the beginning of the process until all weights are in place), when each run
had its last answer, and the limit: 1.1 x (start-up + requests / rate).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen_helm.commands.bench import bench_policy
from flexgen_helm.planning.dummy import open_dummy
from flexgen_helm.planning.record import write_record
from flexgen_helm.planning.roofline import Workload

if TYPE_CHECKING:
    from engine import Engine
    from engine.schedule.timing import SweepTiming

ROOT = Path(__file__).resolve().parent.parent
SLACK = 1.1


def ask(engine: Engine, load: Workload) -> dict[str, Any]:
    """Run all requests in one call; returns the seconds of each run and of everything, and figures of the sweeps."""
    timings: list[SweepTiming] = []
    engine.observer = timings.append
    jobs = load.jobs(engine.parts.model.vocab_size)
    left = [load.num_jobs] * load.num_runs
    ended: list[float] = [0.0] * load.num_runs
    start = time.perf_counter()
    for finished in engine.sweeps(jobs):
        now = time.perf_counter() - start
        for index, completion in finished:
            if completion.error is not None:
                raise completion.error
            run = index // load.num_jobs
            left[run] -= 1
            if not left[run]:
                ended[run] = now
    seconds = time.perf_counter() - start
    engine.observer = None
    return {
        "seconds": seconds,
        "run_ended_s": ended,
        "sweeps": len(timings),
        "sweep_s": sum(timing.sweep_s for timing in timings),
        "host_s": sum(timing.host_s for timing in timings),
        "prefill_rows": sum(timing.prefill_rows for timing in timings),
        "decode_rows": sum(timing.decode_rows for timing in timings),
    }


def main() -> None:
    """Start, run and record."""
    begun = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-30b")
    parser.add_argument("--rows", type=Workload.parse, default=Workload.parse("10x100x400+100:1"))
    parser.add_argument("--rate", type=float, default=95.0, help="requests a second that the bound allows")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--gpu-memory")
    parser.add_argument("--percent", nargs=6, type=int)
    parser.add_argument("--name", help="of the record; default: sweep-suite and the shape")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    policy = bench_policy(options.policy, options.gpu_memory, options.percent)
    with open_dummy(options.shape, policy) as engine:
        engine.wait_until_loaded()
        startup = time.perf_counter() - begun
        print(f"start-up {startup:.2f} s", flush=True)
        asked = ask(engine, options.rows)
    num_requests = options.rows.num_requests
    whole, bare = startup + asked["seconds"], startup + num_requests / options.rate
    for run, ended in enumerate(asked["run_ended_s"], start=1):
        print(f"run {run}: last answer after {ended:.2f} s")
    seconds, bound = asked["seconds"], SLACK * bare
    print(f"{num_requests} requests in {seconds:.2f} s ({num_requests / seconds:.1f} a second)")
    print(
        f"with start-up {whole:.2f} s; bound {SLACK} x ({startup:.2f} + {num_requests}/{options.rate:g}) = "
        f"{bound:.2f} s: {'held' if whole <= bound else 'MISSED'}"
    )
    content = {
        "shape": options.shape,
        "rows": str(options.rows),
        "policy": policy.as_mapping(),
        "startup_s": startup,
        **asked,
        "whole_s": whole,
        "bound_s": bound,
    }
    print(write_record(options.name or f"sweep-suite-{options.shape}", content, options.out))


if __name__ == "__main__":
    main()
