"""Workloads submitted to an engine together: how much of one is hidden behind the others.

    python -m benchmarks.together --shape opt-30b --gpu-memory 16GB --rows 1x64x0+512:32 10x100x400+100:1

Random weights of a real shape, one call for all requests. Prints the time next to the least that the machine allows if
the transfers of one workload overlap with the arithmetic of another, and records every sweep.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen_helm.commands.bench import bench_policy, rates_of
from flexgen_helm.planning.dummy import open_dummy
from flexgen_helm.planning.model_sizes import sizes_of
from flexgen_helm.planning.record import write_record
from flexgen_helm.planning.roofline import Rates, Work, Workload, least_seconds, work_of

if TYPE_CHECKING:
    from engine import Engine
    from engine.planning.limits import Limits
    from engine.schedule.timing import SweepTiming

ROOT = Path(__file__).resolve().parent.parent


def ask(engine: Engine, loads: Sequence[Workload], seed: int = 0) -> dict[str, Any]:
    """Run all requests in one call; returns seconds, when each workload had its last answer, and the sweeps."""
    timings: list[SweepTiming] = []
    engine.observer = timings.append
    vocabulary = engine.parts.model.vocab_size
    jobs = [job for number, load in enumerate(loads) for job in load.jobs(vocabulary, seed + number)]
    owners = [number for number, load in enumerate(loads) for _ in range(load.num_requests)]
    ended = [0.0] * len(loads)
    start = time.perf_counter()
    for finished in engine.sweeps(jobs):
        for index, completion in finished:
            if completion.error is not None:
                raise completion.error
            ended[owners[index]] = time.perf_counter() - start
    seconds = time.perf_counter() - start
    engine.observer = None
    return {"seconds": seconds, "ended_s": ended, "sweeps": [asdict(timing) for timing in timings]}


def together(works: Sequence[Work], streamed_bytes: float) -> Work:
    """The least work of workloads that share their sweeps: each sweep brings the weights once for all."""
    sweeps = max(work.sweeps for work in works)
    weights = sweeps * streamed_bytes
    return Work(
        sweeps=sweeps,
        flop=sum(work.flop for work in works),
        to_device_bytes=weights + sum(work.to_device_bytes - work.sweeps * streamed_bytes for work in works),
        from_device_bytes=sum(work.from_device_bytes for work in works),
        device_bytes=sum(work.device_bytes for work in works),
    )


def rehearsal(load: Workload, limits: Limits) -> Workload:
    """A workload that allocates the same memory in fewer sweeps: as many runs of one-token requests as fill a sweep."""
    if load.new > 1:
        return load.rehearsal(limits.seats)
    of_run = load.prefill_tokens / load.num_runs
    return replace(load, num_runs=min(load.num_runs, math.ceil(limits.rows_per_sweep / of_run)))


def time_together(engine: Engine, loads: Sequence[Workload], rates: Rates) -> dict[str, Any]:
    """Time workloads in one call, after a rehearsal that allocates their memory; returns the least time too."""
    begun = time.perf_counter()
    ask(engine, [rehearsal(load, engine.plan.limits) for load in loads], seed=100)
    rehearsal_s = time.perf_counter() - begun
    sizes = sizes_of(engine)
    found = ask(engine, loads)
    work = together([work_of(load, sizes, engine.plan) for load in loads], sizes.streamed_bytes)
    least = least_seconds(work, rates)
    return {
        **found,
        "rehearsal_s": rehearsal_s,
        "limit_s": max(least.values()),
        "bound": max(least, key=lambda resource: least[resource]),
        "least_s": least,
    }


def main() -> None:
    """Time the workloads and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-30b")
    parser.add_argument("--rows", nargs="+", type=Workload.parse, required=True)
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--gpu-memory")
    parser.add_argument("--name", default="together", help="of the record")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    policy = bench_policy(options.policy, options.gpu_memory, None)
    rates = rates_of(policy, options.shape)
    begun = time.perf_counter()
    with open_dummy(options.shape, policy) as engine:
        engine.wait_until_loaded()
        print(f"{options.shape} filled in {time.perf_counter() - begun:.1f} s", flush=True)
        found = time_together(engine, options.rows, rates)
        content = {"shape": options.shape, "rows": [*map(str, options.rows)], "policy": policy.as_mapping()}
        content |= {"plan": asdict(engine.plan), "rates": asdict(rates), **found}
    print(
        f"{' and '.join(content['rows'])}: {found['seconds']:.3f} s in {len(found['sweeps'])} sweeps; "
        f"limit {found['limit_s']:.3f} s ({found['bound']}), {found['limit_s'] / found['seconds']:.0%}"
    )
    print(write_record(options.name, content, options.out))


if __name__ == "__main__":
    main()
