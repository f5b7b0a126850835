"""Whether the policy of `auto` is the best, and its estimate right: `python -m benchmarks.planner [--cases N …]`."""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from engine.errors import EngineError
from engine.memory import accelerator
from engine.planning.hardware import available_memory, resolve_device
from engine.planning.hardware_profile import HardwareProfile
from engine.policy import Policy
from engine.reading import parse_bytes
from flexgen_helm.commands.bench import timed
from flexgen_helm.planning.dummy import open_dummy, shape_model
from flexgen_helm.planning.estimate import Estimate
from flexgen_helm.planning.policy_search import best_of, search
from flexgen_helm.planning.record import write_record
from flexgen_helm.planning.roofline import Workload
from flexgen_helm.terminal.errors import RunFailed

ROOT = Path(__file__).resolve().parent.parent
POINTS = 12


@dataclass(frozen=True)
class Case:
    """The task of a policy search, and how many other policies its choice is compared with."""

    shape: str
    gpu_memory: str
    work: str
    points: int = POINTS


CASES = (
    Case("opt-1.3b", "2GB", "1x64x0+256:8"),
    Case("opt-1.3b", "2GB", "10x100x400+100:1"),
    Case("opt-1.3b", "3GB", "1x100x0+400:16"),
    Case("opt-6.7b", "6GB", "1x32x0+256:8"),
    Case("opt-6.7b", "4GB", "10x100x400+100:1"),
    Case("opt-30b", "16GB", "1x88x0+512:32", points=0),
    # From here on, cases that no estimate was fitted to.
    Case("opt-1.3b", "2.5GB", "1x48x0+300:12", points=4),
    Case("opt-1.3b", "2GB", "1x24x200+60:20", points=4),
    Case("opt-1.3b", "2GB", "4x40x600+60:2", points=4),
    Case("opt-6.7b", "8GB", "1x40x0+400:10", points=4),
    Case("opt-6.7b", "5GB", "6x60x300+80:1", points=4),
    Case("opt-6.7b", "7GB", "2x50x500+50:4", points=4),
    Case("llama-3-8b", "6GB", "1x64x0+512:8", points=4),
    Case("llama-3-8b", "8GB", "8x80x600+90:1", points=4),
    Case("llama-3-8b", "5GB", "4x60x250+60:5", points=4),
    Case("opt-13b", "10GB", "5x60x400+100:2", points=0),
)


def grid(found: list[Estimate], points: int) -> list[Estimate]:
    """Choose `points` of `found` over the range of device percents, half of them with attention on the host if any.

    Estimates of more than three times the best are left out, because they would take long to run.
    """
    chosen: list[Estimate] = []
    found = sorted(
        (each for each in found if each.seconds < 3 * found[0].seconds), key=lambda each: each.plan.weights.gpu
    )
    kinds = [[each for each in found if each.policy.cpu_cache_compute is on_host] for on_host in (False, True)]
    kinds = [kind for kind in kinds if kind]
    for kind in kinds:
        count = min(len(kind), points // len(kinds))
        chosen += [kind[round(i * (len(kind) - 1) / max(1, count - 1))] for i in range(count)]
    return chosen


def run(shape: str, found: Estimate, load: Workload) -> dict[str, Any]:
    """Time `load` under a policy, the faster of two runs after a rehearsal; returns seconds and the estimate."""
    start = time.perf_counter()
    row: dict[str, Any] = {
        "gpu_percent": found.plan.weights.gpu,
        "host_attention": found.policy.cpu_cache_compute,
        "estimate_s": found.seconds,
        "bottleneck": found.bottleneck,
        "estimate_placed_bytes": dict(found.held),
    }
    try:
        accelerator.reset_peak(torch.device(resolve_device("auto")))
        with open_dummy(shape, found.policy) as engine:
            timed(engine, load.rehearsal(engine.plan.limits.seats), seed=1)
            row["seconds"], row["sweeps"] = min(timed(engine, load) for _ in range(2))
            row["placed_bytes"] = engine.placed_bytes()
            row["device_reserved_bytes"] = accelerator.peak_memory(engine.parts.arena.device)
    except (EngineError, RunFailed) as error:
        row["error"] = str(error)
    gc.collect()
    row["whole_s"] = time.perf_counter() - start
    took = f"{row['seconds']:.2f} s" if "seconds" in row else row["error"]
    print(f"  {_place(row)}: {took}, estimated {found.seconds:.2f} s; whole {row['whole_s']:.1f} s", flush=True)
    return row


def _place(row: dict[str, Any]) -> str:
    return f"{row['gpu_percent']:g} %" + (" and attention on the host" if row["host_attention"] else "")


def examine(case: Case, points: int, profile: HardwareProfile) -> dict[str, Any]:
    """Search, run the choice and the grid, and compare them."""
    load, base = Workload.parse(case.work), Policy(gpu_memory=parse_bytes(case.gpu_memory, "case"))
    memory = available_memory(resolve_device("auto"), base.gpu_memory, None, None)
    with tempfile.TemporaryDirectory() as folder:
        model = shape_model(case.shape, profile.dtype, Path(folder))
    start = time.perf_counter()
    found = search(model, profile, memory, load, base, compress=False)
    record = asdict(case) | {"search_s": time.perf_counter() - start, "chosen": run(case.shape, best_of(found), load)}
    record["grid"] = [run(case.shape, each, load) for each in grid(found, points)]
    seconds, done = record["chosen"].get("seconds"), [row["seconds"] for row in record["grid"] if "seconds" in row]
    if seconds is not None:
        record["beside_estimate"] = seconds / record["chosen"]["estimate_s"]
        record["beside_best"] = seconds / min(done) if done else None
    return record


def _line(case: dict[str, Any]) -> str:
    chosen = case["chosen"]
    what = f"{case['shape']} in {case['gpu_memory']}, {case['work']}"
    if "seconds" not in chosen:
        return f"{what}: {chosen['error']}"
    line = f"{what}: {chosen['seconds']:.2f} s with {_place(chosen)}, {case['beside_estimate']:.2f} x the estimate"
    if case["beside_best"] is not None:
        line += f", {case['beside_best']:.2f} x the best of {len(case['grid'])}"
    return f"{line}; searched for {case['search_s']:.2f} s"


def main() -> int:
    """Run the cases, print how close the choice is to the best of the grid, and write each shape's record at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", type=int, default=range(len(CASES)), help="numbers, from 0 on")
    parser.add_argument("--points", type=int, default=POINTS, help="of the grid, at most; 0 for the choice alone")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    profile = HardwareProfile.load()
    done: dict[str, list[dict[str, Any]]] = {}
    for number in options.cases:
        case = examine(CASES[number], min(CASES[number].points, options.points), profile)
        print(_line(case), flush=True)
        cases = done.setdefault(CASES[number].shape, [])
        cases.append(case)
        content = {"profile": profile.as_mapping(), "cases": cases}
        print(write_record(f"planner-{CASES[number].shape}", content, options.out), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
