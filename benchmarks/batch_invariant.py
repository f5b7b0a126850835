"""The cost of `batch-invariant: true`: the same workloads with and without it, in one call on one machine.

    python -m benchmarks.batch_invariant [--limit SECONDS] [--out DIR]

Each side is `flexgen-helm bench` in a process of its own, which runs each workload several times; the record holds both
sides, and the rate with `batch-invariant` as a fraction of the normal rate, from the medians.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from flexgen_helm.planning.record import write_record

ROOT = Path(__file__).resolve().parent.parent
ROWS = {
    "opt-6.7b": (None, ("1x96x0+512:32",)),
    "opt-30b": ("16GB", ("1x100x400+100:1",)),
}
"""Shape -> (GPU memory, workloads)."""
REPEATS = 3


def bench(shape: str, memory: str | None, rows: tuple[str, ...], policy: dict[str, Any], limit: float) -> Any:
    """Run `flexgen-helm bench` once; returns its record."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "policy.yaml"
        file.write_text(yaml.safe_dump(policy))
        command = [sys.executable, "-m", "flexgen_helm", "bench", "--shape", shape, "--policy", str(file)]
        command += ["--out", folder, "--rows", *rows * REPEATS, *(["--gpu-memory", memory] if memory else [])]
        subprocess.run(command, timeout=limit, check=True)
        (found,) = Path(folder).glob("bench-*.json")
        return json.loads(found.read_text(encoding="utf-8"))


def main() -> None:
    """Time both sides of each workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=300, help="seconds for each side of a row, loading included")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    told = []
    for shape, (memory, rows) in ROWS.items():
        normal, invariant = (
            bench(shape, memory, rows, {} if normal else {"batch-invariant": True}, options.limit)
            for normal in (True, False)
        )
        for row in rows:
            sides = [[each for each in side["rows"] if each["row"] == row] for side in (normal, invariant)]
            seconds = [median(each["seconds"] for each in side) for side in sides]
            fraction = seconds[0] / seconds[1]
            times = f"{seconds[0]:.3f} s, batch-invariant {seconds[1]:.3f} s"
            print(f"{shape} {row}: {times}, {fraction:.2f} of the rate", flush=True)
            told.append(
                {"shape": shape, "gpu_memory": memory, "normal": sides[0], "invariant": sides[1], "fraction": fraction}
            )
    print(write_record("batch-invariant", {"rows": told}, options.out))


if __name__ == "__main__":
    main()
