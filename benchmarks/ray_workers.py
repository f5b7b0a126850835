"""How close workers of a Ray cluster come to linear speed-up, on work that only sleeps and needs no cores.

    python benchmarks/ray_workers.py --workers 4 --seconds 60

One worker and several workers get the same work per worker, alternately, in the same cluster; driver, ledger and Ray
are real, and the engine sleeps in proportion to the rows of its sweeps. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])

from sleeping_engine import ROW_S, VOCABULARY, answer, open_sleeping  # noqa: E402

from engine.hosts.expected import Expected  # noqa: E402
from engine.hosts.hosts_engine import HostsEngine  # noqa: E402
from engine.hosts.messages import Opening  # noqa: E402
from engine.job import Job  # noqa: E402
from engine.policy import Policy  # noqa: E402
from engine.workers.packing import PackedJobs  # noqa: E402
from flexgen_helm.workers.cluster.connection import connect  # noqa: E402
from flexgen_helm.workers.cluster.ray_supply import RaySupply  # noqa: E402
from flexgen_helm.workers.cluster.slots import Wanted  # noqa: E402
from flexgen_helm.workers.cluster.versions import versions  # noqa: E402

OWN, SHARED, GROUP = 60, 300, 40
"""A prompt's own tokens, those shared by its group, and prompts in a group."""


def jobs_of(seconds: float) -> list[Job]:
    """Make groups of prompts that take so long if each prompt's rows are computed."""
    groups = max(1, round(seconds / (GROUP * (OWN + SHARED) * ROW_S)))
    shared = [[group * 7 % VOCABULARY, *range(1, SHARED)] for group in range(groups)]
    return [
        Job(prompt=(*shared[group], *[(group * GROUP + at) % VOCABULARY] * OWN), max_new_tokens=4)
        for group in range(groups)
        for at in range(GROUP)
    ]


def measure(ray: object, workers: int, seconds: float) -> tuple[float, int]:
    """Run `seconds` of work for each worker; returns the seconds taken and the number of jobs."""
    supply = RaySupply(ray, Wanted(workers=workers, gpus_per_worker=0), versions(), open_sleeping)
    opening = Opening(model="none", policy=Policy(), jobs=PackedJobs.of([]))
    expected = Expected(identity={"dtype": "float32"}, versions=versions())
    jobs = jobs_of(seconds * workers)
    with HostsEngine(opening, supply, expected, path="", digest=lambda: None) as engine:
        while len(engine.hosts) < workers:
            time.sleep(0.1)
        started = time.perf_counter()
        done = engine.run(jobs)
        taken = time.perf_counter() - started
    assert [each.text for each in done] == [answer(job).text for job in jobs]
    return taken, len(jobs)


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60.0, help="of work for each worker")
    parser.add_argument("--turns", type=int, default=2)
    args = parser.parse_args()
    ray = connect("local", args.workers)
    ones, severals, count = [], [], 0
    for _ in range(args.turns):
        ones.append(measure(ray, 1, args.seconds)[0])
        taken, count = measure(ray, args.workers, args.seconds)
        severals.append(taken)
    print(
        json.dumps(
            {
                "workers": args.workers,
                "seconds_of_work_each": args.seconds,
                "jobs": count,
                "one_s": min(ones),
                "several_s": min(severals),
                "of_linear": min(ones) / min(severals),
                "answers_per_s": count / min(severals),
            }
        )
    )
    ray.shutdown()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
