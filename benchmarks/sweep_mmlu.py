"""Real MMLU, all 57 subjects in one command, which is killed once and resumed.

    python -m benchmarks.sweep_mmlu --data DIR --model DIR --work DIR [--subjects …] [--instances N] [--kill-at 0.4]

The data directory holds `mmlu/{dev,test}/SUBJECT_SPLIT.csv` (Hendrycks et al. 2021). The sweep is killed by SIGKILL
when `--kill-at` of the requests are in HELM's cache, and the same command is run again. `--work` is kept: a benchmark
that was itself interrupted continues there. Records time, tokens, what prefix sharing saved, memory, scores, and which
part of the time matrix products of the model's own sizes would take.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.helm_client import count_tokens, gemm_seconds, place_data, predictions
from flexgen_helm.planning.record import write_record
from flexgen_helm.sweeps.record import read_record

ROOT = Path(__file__).resolve().parent.parent
SUITE = "mmlu"


def kept(work: Path) -> int:
    """Number of answers in HELM's request cache."""
    file = work / "prod_env" / "cache" / "flexgen.sqlite"
    if not file.exists():
        return 0
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=30) as connection:
        try:
            return int(connection.execute("SELECT count(*) FROM unnamed").fetchone()[0])
        except sqlite3.OperationalError:  # no table yet
            return 0


def run(command: list[str], work: Path, kill_at: int | None) -> dict[str, Any]:
    """Run the sweep, to its end or until so many answers are stored; returns seconds and the answers stored by then."""
    start = time.perf_counter()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with (work / "sweep.out").open("a") as out:
        process = subprocess.Popen(command, cwd=work, stdout=out, stderr=out, env=env)
        while process.poll() is None:
            time.sleep(1.0)
            if kill_at is not None and kept(work) >= kill_at:
                process.send_signal(signal.SIGKILL)
                process.wait()
    return {"seconds": time.perf_counter() - start, "exit": process.returncode, "kept": kept(work)}


def scores(suite: Path) -> dict[str, float]:
    """Fraction of right answers on the test split, by run."""
    found = {}
    for file in suite.glob("*/stats.json"):
        for stat in json.loads(file.read_text()):
            if stat["name"] == {"name": "exact_match", "split": "test"}:
                found[file.parent.name.split(",")[0].partition("subject=")[2]] = stat["mean"]
    return found


def main() -> None:
    """Run, kill, resume and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with mmlu/{dev,test}/*.csv")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model directory")
    parser.add_argument("--work", type=Path, required=True, help="directory of output and cache; kept")
    parser.add_argument("--subjects", nargs="+", help="default: all there are")
    parser.add_argument("--instances", type=int, help="questions of each subject; default: all")
    parser.add_argument("--at-once", type=int, default=256, help="requests of a sweep, whose work a kill may lose")
    parser.add_argument("--kill-at", type=float, default=0.4, help="part of the requests after which it is killed")
    parser.add_argument("--name", default="sweep-mmlu", help="name of the record")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    tests = {file.name.removesuffix("_test.csv"): file for file in sorted((options.data / "mmlu/test").glob("*.csv"))}
    subjects = options.subjects or list(tests)
    work: Path = options.work.resolve()
    output = work / "benchmark_output"
    if not output.exists():
        place_data(options.data, subjects, output, gsm=False)
    entries = [f"mmlu:subject={subject}" for subject in subjects]
    command = [sys.executable, "-m", "flexgen_helm", "sweep", "-r", *entries, "--model", str(options.model.resolve())]
    command += ["--suite", SUITE, "--json-log", "events.jsonl", "--skip-completed-runs"]
    command += ["--gpu-batch-size", str(options.at_once), "--num-gpu-batches", "1"]
    if options.instances:
        command += ["-m", str(options.instances)]
    counts = [sum(1 for _ in csv.reader(tests[subject].open(newline=""))) for subject in subjects]
    total = sum(min(count, options.instances or count) for count in counts)
    parts = []
    if kept(work) < options.kill_at * total:
        parts.append({**run(command, work, int(options.kill_at * total)), "ended_by": "SIGKILL"})
        print(f"killed after {parts[-1]['seconds']:.0f} s with {parts[-1]['kept']} of {total} answers", flush=True)
    parts.append(run(command, work, None))
    print(f"resumed: {parts[-1]['seconds']:.0f} s, exit code {parts[-1]['exit']}", flush=True)
    found = read_record(output / "runs" / SUITE)
    assert found is not None
    tokens = count_tokens(options.model, predictions(output / "runs" / SUITE))
    limit_s = gemm_seconds(options.model, int(tokens["computed_tokens"]), int(tokens["answer_tokens"]))
    seconds = sum(part["seconds"] for part in parts)
    right = scores(output / "runs" / SUITE)
    content = {
        "model": options.model.name,
        "subjects": len(subjects),
        "requests": total,
        "at_once": options.at_once,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "parts": parts,
        "seconds": seconds,
        "requests_per_s": total / seconds,
        "tokens": tokens,
        "sharing_saves": tokens["tokens_of_one_by_one"] / tokens["computed_tokens"],
        "gemm_s": limit_s,
        "fraction_of_gemm": limit_s / seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "runs": {status: sum(run.status == status for run in found.runs) for status in ("done", "failed", "skipped")},
        "last_part": [{**asdict(model), "timeline": None} for model in found.models],
        "mean_exact_match": fmean(right.values()) if right else None,
        "exact_match": right,
    }
    print(f"{total} requests in {seconds:.0f} s; mean score {content['mean_exact_match']}")
    print(write_record(options.name, content, options.out))


if __name__ == "__main__":
    main()
