"""Whether memory grows: `python -m benchmarks.memory --shape opt-1.3b --gpu-memory 2GB --runs 50`.

Runs the same small workload many times in one process, and compares the memory held after the fifth run with that after
the last: memory that torch reserves on the device, resident memory of the process, page-locked bytes. With `--reopen`,
every run has an engine of its own, which shows what remains after closing. The exit code is 1 if anything grew, if the
device's limit was exceeded, or if host memory exceeds what was placed there by more than 5 %.
"""

from __future__ import annotations

import argparse
import gc
import os
from pathlib import Path
from typing import Any

import torch

from engine import Engine, Policy
from flexgen_helm.commands.bench import bench_policy, timed
from flexgen_helm.planning.dummy import open_dummy, shape_name
from flexgen_helm.planning.record import write_record
from flexgen_helm.planning.roofline import Workload

ROOT = Path(__file__).resolve().parent.parent
WARM_RUNS = 5
GROWTH_BYTES = 64 << 20
"""Bytes by which resident memory may differ between two measurements, because allocators keep free pages."""
EXCESS = 0.05


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def look(engine: Engine | None) -> dict[str, int]:
    """Return the memory that is held now."""
    gc.collect()
    placed = {} if engine is None else engine.placed_bytes()
    pinned = torch.cuda.host_memory_stats() if torch.cuda.is_available() else {}
    return {
        "resident_bytes": resident_bytes(),
        "placed_host_bytes": placed.get("host", 0),
        "torch_pinned_bytes": int(pinned.get("allocated_bytes.current", 0)),
        "device_reserved_bytes": torch.cuda.memory_reserved() if torch.cuda.is_available() else 0,
    }


def verdicts(
    before: dict[str, int], early: dict[str, int], late: dict[str, int], peak_device: int, limit: int | None
) -> list[str]:
    """Return one line for each thing that is not as it should be.

    `before`: without an engine, `early`: after the fifth run, `late`: after the last; bytes, as `look` returns them.
    """
    found = []
    for name, allowed in (
        ("resident_bytes", GROWTH_BYTES),
        ("placed_host_bytes", 0),
        ("torch_pinned_bytes", 0),
        ("device_reserved_bytes", 0),
    ):
        if late[name] - early[name] > allowed:
            found.append(f"{name} grew from {early[name]} to {late[name]}")
    if limit is not None and peak_device > limit:
        found.append(f"the device's {peak_device} reserved bytes exceed the limit of {limit}")
    held, planned = late["resident_bytes"] - before["resident_bytes"], late["placed_host_bytes"]
    planned += late["torch_pinned_bytes"] - before["torch_pinned_bytes"]
    if planned and held > planned * (1 + EXCESS) + GROWTH_BYTES:
        found.append(f"host memory of {held} bytes exceeds the {planned} placed there by more than {EXCESS:.0%}")
    return found


def run_often(shape: str, policy: Policy, load: Workload, runs: int, *, reopen: bool) -> list[dict[str, int]]:
    """Measure the memory held after each run; with `reopen`, after each engine is closed."""
    looks: list[dict[str, int]] = []
    if reopen:
        for seed in range(runs):
            with open_dummy(shape, policy) as engine:
                timed(engine, load, seed)
            looks.append(look(None))
        return looks
    with open_dummy(shape, policy) as engine:
        for seed in range(runs):
            timed(engine, load, seed)
            looks.append(look(engine))
    return looks


def main() -> int:
    """Run, compare and record; returns 1 if anything is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-1.3b")
    parser.add_argument("--row", type=Workload.parse, default="1x16x64+32:4")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--reopen", action="store_true", help="open an engine for every run")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--gpu-memory")
    parser.add_argument("--percent", nargs=6, type=int)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    if options.runs <= WARM_RUNS:
        parser.error(f"--runs must be more than {WARM_RUNS}")
    policy = bench_policy(options.policy, options.gpu_memory, options.percent)
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")  # host memory of the driver belongs to no run
    open_dummy_once(options.shape, policy)
    before = look(None)
    looks = run_often(options.shape, policy, options.row, options.runs, reopen=options.reopen)
    peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    found = verdicts(before, looks[WARM_RUNS - 1], looks[-1], peak, policy.gpu_memory if peak else None)
    content: dict[str, Any] = {
        "shape": options.shape,
        "row": str(options.row),
        "policy": policy.as_mapping(),
        "reopen": options.reopen,
        "before": before,
        f"after_{WARM_RUNS}": looks[WARM_RUNS - 1],
        f"after_{options.runs}": looks[-1],
        "resident_bytes": [held["resident_bytes"] for held in looks],
        "device_reserved_peak_bytes": peak,
        "found": found,
    }
    for name, held in (("before", before), (f"after {WARM_RUNS}", looks[WARM_RUNS - 1]), ("at the end", looks[-1])):
        print(f"{name:12}", "  ".join(f"{key} {value / 1e6:.1f} MB" for key, value in held.items()), flush=True)
    print("; ".join(found) or "nothing grew", flush=True)
    name = f"memory-{shape_name(options.shape)}{'-reopen' if options.reopen else ''}"
    print(write_record(name, content, options.out))
    return int(bool(found))


def open_dummy_once(shape: str, policy: Policy) -> None:
    """Load what the process needs to open any engine (modules, kernels), so that it is not counted as growth."""
    with open_dummy(shape, policy) as engine:
        timed(engine, Workload(1, 1, 0, 8, 2))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    raise SystemExit(main())
