"""Workloads whose keys and values are off the GPU, or encoded, in one command: the README's, and others.

    python -m benchmarks.offloaded [--rows NAME …] [--limit SECONDS] [--out DIR]

Each row is `flexgen-helm bench` in a process of its own, with a policy that is written here; a row that fails or takes
longer than `--limit` is reported, and the others are run. Records are named after the row.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
_CODES = {"compress-weight": 4, "compress-cache": 4}
_LOSSLESS = {"compress-weight": "lossless"}
_EIGHTH = {"weights": {"gpu": 13, "cpu": 87}}
_HALF = {"weights": {"gpu": 50, "cpu": 50}}


def _seats(count: int) -> dict[str, int]:
    """Settings for at most `count` running sequences, while the others wait."""
    return {"gpu-batch-size": count, "num-gpu-batches": 1}


@dataclass(frozen=True)
class Row:
    """The arguments of one call of `flexgen-helm bench`."""

    shape: str
    gpu_memory: str
    policy: dict[str, Any]
    workloads: tuple[str, ...]


ROWS = {
    "opt-30b-16GB-4bit": Row("opt-30b", "16GB", {**_CODES, **_HALF}, ("1x256x0+512:32",)),
    "opt-30b-16GB-4bit-waiting": Row("opt-30b", "16GB", {**_CODES, **_HALF, **_seats(256)}, ("2x256x0+512:32",)),
    "opt-6.7b-6GB-4bit": Row("opt-6.7b", "6GB", {**_CODES, "weights": {"gpu": 40, "cpu": 60}}, ("1x256x0+512:32",)),
    "llama-3-70b-16GB-4bit-weights": Row(
        "llama-3-70b", "16GB", {"compress-weight": 4, "weights": {"gpu": 12, "cpu": 88}}, ("1x400x0+512:32",)
    ),
    "llama-3-70b-16GB-4bit-weights-waiting": Row(
        "llama-3-70b",
        "16GB",
        {"compress-weight": 4, "weights": {"gpu": 12, "cpu": 88}, **_seats(400)},
        ("2x400x0+512:32",),
    ),
    "llama-3-8b-6GB": Row("llama-3-8b", "6GB", _EIGHTH, ("1x10x0+512:32",)),
    "llama-3-8b-6GB-lossless": Row("llama-3-8b", "6GB", {**_EIGHTH, **_LOSSLESS}, ("1x10x0+512:32",)),
    "llama-3-70b-16GB-lossless": Row(
        "llama-3-70b", "16GB", {**_LOSSLESS, "weights": {"gpu": 6, "cpu": 94}}, ("1x32x0+512:32",)
    ),
    "opt-30b-16GB-host-attention": Row("opt-30b", "16GB", {"cpu-cache-compute": True}, ("1x88x0+512:32",)),
    "opt-175b-16GB-4bit": Row("opt-175b", "16GB", _CODES, ("1x100x400+100:1", "1x32x0+512:32")),
}


def run(name: str, row: Row, limit: float, out: Path) -> str:
    """Time a row; returns a line on its result."""
    with tempfile.TemporaryDirectory() as folder:
        policy = Path(folder) / "policy.yaml"
        policy.write_text(yaml.safe_dump(row.policy))
        command = [sys.executable, "-m", "flexgen_helm", "bench", "--shape", row.shape, "--gpu-memory", row.gpu_memory]
        command += ["--policy", str(policy), "--out", folder, "--rows", *row.workloads]
        try:
            code = subprocess.run(command, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            code = None
        found = list(Path(folder).glob("bench-*.json"))
        for file in found:  # one record, even of a row that failed later
            shutil.move(file, out / f"bench-{name}.json")
    outcome = f"took longer than {limit:.0f} s" if code is None else f"exit code {code}" if code else "done"
    return outcome if found else f"{outcome}, no record"


def main() -> None:
    """Time the rows, and report each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--limit", type=float, default=300, help="seconds for each row, loading included")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the records")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes = {}
    for name in options.rows:
        print(f"--- {name}", flush=True)
        outcomes[name] = run(name, ROWS[name], options.limit, options.out)
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome}")


if __name__ == "__main__":
    main()
