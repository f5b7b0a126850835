"""Is the policy that `auto` chooses the best, and is its estimate right? `python -m benchmarks.planner [--cases N …]`.

For each case (a shape, a limit on the card's memory, a workload) the search's choice and a grid of other policies are
run, one after the other in one process, on random weights. Needs the machine's hardware profile (`doctor --profile`).
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

from engine import accelerator
from engine.errors import EngineError
from engine.hardware import available_memory, resolve_device
from engine.hardware_profile import HardwareProfile
from engine.policy import Policy, parse_bytes
from flexgen_helm.auto_policy import best_of
from flexgen_helm.bench import timed
from flexgen_helm.dummy import open_dummy
from flexgen_helm.errors import RunFailed
from flexgen_helm.plan import _model
from flexgen_helm.policy_search import Estimate, search
from flexgen_helm.record import write_record
from flexgen_helm.roofline import Workload

ROOT = Path(__file__).resolve().parent.parent
CASES = (
    ("opt-1.3b", "2GB", "1x64x0+256:8"),
    ("opt-1.3b", "2GB", "1x100x400+100:1"),
    ("opt-1.3b", "3GB", "4x50x200+50:4"),
    ("opt-6.7b", "6GB", "1x32x0+256:8"),
    ("opt-6.7b", "4GB", "1x100x400+100:1"),
)
POINTS = 12


def grid(found: list[Estimate], points: int) -> list[Estimate]:
    """As many of `found`, half of them with attention on the host, over the whole range of percents on the device."""
    chosen: list[Estimate] = []
    for on_host in (False, True):
        kind = [each for each in found if each.policy.cpu_cache_compute is on_host]
        kind.sort(key=lambda each: each.plan.weights.gpu)
        count = min(len(kind), points // 2)
        chosen += [kind[round(i * (len(kind) - 1) / max(1, count - 1))] for i in range(count)]
    return chosen


def run(shape: str, found: Estimate, load: Workload) -> dict[str, Any]:
    """Seconds of `load` under a policy, after a rehearsal, beside what was estimated."""
    start = time.perf_counter()
    row: dict[str, Any] = {
        "gpu_percent": found.plan.weights.gpu,
        "host_attention": found.policy.cpu_cache_compute,
        "estimate_s": found.seconds,
        "bottleneck": found.bottleneck,
    }
    try:
        with open_dummy(shape, found.policy) as engine:
            timed(engine, load.rehearsal(engine.plan.limits.seats), seed=1)
            row["seconds"], row["sweeps"] = timed(engine, load)
            row["device_reserved_bytes"] = accelerator.peak_memory(engine._arena.device)
    except (EngineError, RunFailed) as error:
        row["error"] = str(error)
    gc.collect()
    row["whole_s"] = time.perf_counter() - start
    return row


def main() -> int:
    """Run the cases, print how near the choice is to the best of the grid, and write the record after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", type=int, default=range(len(CASES)), help="numbers, from 0 on")
    parser.add_argument("--points", type=int, default=POINTS, help="of the grid")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    profile, record = HardwareProfile.load(), dict[str, Any]()
    for number in options.cases:
        shape, limit, work = CASES[number]
        load, base = Workload.parse(work), Policy(gpu_memory=parse_bytes(limit, "case"))
        memory = available_memory(resolve_device("auto"), base.gpu_memory, None, None)
        with tempfile.TemporaryDirectory() as folder:
            model = _model(shape, profile.dtype, Path(folder))
        start = time.perf_counter()
        found = search(model, profile, memory, load, base, compress=False)
        search_s = time.perf_counter() - start
        chosen = run(shape, best_of(found), load)
        rows = [run(shape, each, load) for each in grid(found, options.points)]
        done = [row["seconds"] for row in rows if "seconds" in row]
        case = {"shape": shape, "gpu_memory": limit, "work": work, "search_s": search_s, "chosen": chosen, "grid": rows}
        if done and "seconds" in chosen:
            case["beside_best"] = chosen["seconds"] / min(done)
            case["beside_estimate"] = chosen["seconds"] / chosen["estimate_s"]
            print(
                f"{shape} in {limit}, {work}: {chosen['seconds']:.2f} s with {chosen['gpu_percent']:g} %, "
                f"{case['beside_best']:.2f} x the best of {len(done)}, {case['beside_estimate']:.2f} x the estimate",
                flush=True,
            )
        else:
            print(f"{shape} in {limit}, {work}: {chosen.get('error', 'the grid failed')}", flush=True)
        record.setdefault("cases", []).append(case)
        path = write_record("planner", record, options.out)
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
