"""The cost of comparing with stock layers, relative to the run that is compared, for a model of a real shape.

    python -m benchmarks.verify [--shape opt-30b] [--gpu-memory 16GB] [--cpu-memory 64GB] [--rows 1x32x400+100:1 …]

Each row is a workload of `flexgen-helm bench`, RUNSxREQUESTSxSHARED+OWN:NEW. The engine answers it, after a rehearsal
that allocates the memory; then `Engine.compare_with_stock`, which `flexgen-helm verify` calls for a model that host
memory cannot hold, computes the same tokens both ways, twice; the second time counts, when memory is allocated and
kernels are loaded. The first time is recorded too; on a machine that was just started, libraries are read from disk
then. The ratio is that of run and comparison together to the run alone. Weights are random, so they are not compared
with a checkpoint.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine import Engine, Policy
from flexgen_helm.commands.bench import timed
from flexgen_helm.planning.dummy import open_dummy, shape_name
from flexgen_helm.planning.record import write_record
from flexgen_helm.planning.roofline import Workload

ROOT = Path(__file__).resolve().parent.parent
ROWS = ("1x32x400+100:1", "1x32x0+500:1", "1x32x400+100:32")
_LAYERS_TOLD = 3


def compared(engine: Engine, load: Workload) -> dict[str, Any]:
    """Time a run and its comparison; returns the seconds and the findings."""
    rehearsal = load.rehearsal(engine.plan.limits.seats)
    timed(engine, rehearsal, seed=1)
    jobs = load.jobs(engine.parts.model.vocab_size, 0)
    before, start = engine.num_sweeps, time.perf_counter()
    done = engine.run(jobs)
    run_s = time.perf_counter() - start
    if failed := next((each.error for each in done if each.error is not None), None):
        raise failed
    sweeps, seconds = engine.num_sweeps - before, list[float]()
    for _ in range(2):
        start = time.perf_counter()
        found = engine.compare_with_stock(jobs, done)
        seconds.append(time.perf_counter() - start)
    first_s, compare_s = seconds
    worst = sorted(found.stages, key=lambda stage: -stage.relative)[:_LAYERS_TOLD]
    return {
        "row": str(load),
        "run_s": run_s,
        "sweeps": sweeps,
        "compare_s": compare_s,
        "first_compare_s": first_s,
        "passes": found.num_passes,
        "ratio": (run_s + compare_s) / run_s,
        "attention": found.attention,
        "tolerance": found.tolerance,
        "is_within": all(stage.is_within for stage in found.stages),
        "worst": [asdict(stage) for stage in worst],
    }


def line(row: dict[str, Any]) -> str:
    """Format a row of the printed table."""
    worst = row["worst"][0]
    return (
        f"{row['row']:>20}  run {row['run_s']:8.2f} s in {row['sweeps']} sweeps  compare {row['compare_s']:8.2f} s in "
        f"{row['passes']} passes (at first {row['first_compare_s']:.2f} s)  ratio {row['ratio']:5.2f}  "
        f"{worst['name']} {worst['relative']:.1e} of its scale"
        f"{'' if row['is_within'] else ', more than rounding'}"
    )


def main() -> None:
    """Time the rows and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-30b", help="as for flexgen-helm bench")
    parser.add_argument("--policy", default="auto", help="a shipped policy's name, a YAML file, or auto")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="what torch may reserve on the device")
    parser.add_argument("--cpu-memory", metavar="SIZE", help="page-locked and placed bytes")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    limits = {"gpu-memory": options.gpu_memory, "cpu-memory": options.cpu_memory}
    told = dict(Policy.load(options.policy).as_mapping())
    policy = Policy.load({**told, **{key: value for key, value in limits.items() if value is not None}})
    loads = [Workload.parse(row) for row in options.rows]
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with open_dummy(options.shape, policy) as engine:
        record: dict[str, Any] = {
            "shape": options.shape,
            "policy": policy.as_mapping(),
            "plan": asdict(engine.plan),
            "load_s": time.perf_counter() - start,
            "rows": [],
        }
        print(f"{options.shape} filled in {record['load_s']:.1f} s", flush=True)
        for load in loads:
            row = compared(engine, load)
            print(line(row), flush=True)
            record["rows"].append(row)
            path = write_record(f"verify-{shape_name(options.shape)}", record, options.out)
    print(path)


if __name__ == "__main__":
    main()
