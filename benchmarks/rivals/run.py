"""Rivals side by side: `python -m benchmarks.rivals.run --shape opt-30b --row 1x64x0+512:32 --gpu-memory 16GB`.

Every contender is a process of its own, with random weights of the same shape, and the same workload and memory limit;
for one that fails or takes too long, the row says so. Published figures are quoted below the table, with their source;
they were not measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.rivals.contender import MARK
from flexgen_helm.planning.record import write_record
from flexgen_helm.planning.roofline import Workload

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MODULES = {
    "flexllmgen": "flexllmgen",
    "accelerate": "accelerate_offload",
    "deepspeed": "deepspeed_zero",
    "transformers": "transformers_generate",
    "transformers-1": "transformers_generate",
    "generate_batch": "generate_batch",
    "freetoken": "freetoken",
}
"""The script of each contender."""


def command_of(contender: str, options: argparse.Namespace, out: Path) -> list[str]:
    """The command line of a contender, "flexgen-helm" or one of `MODULES`, with further flags after its name."""
    name, *flags = shlex.split(contender)
    limit = ["--gpu-memory", options.gpu_memory] if options.gpu_memory else []
    if name == "flexgen-helm":
        rest = ["bench", "--shape", options.shape, "--rows", str(options.row), "--out", str(out), *limit, *flags]
        return [sys.executable, "-m", "flexgen_helm", *rest]
    common = ["--shape", options.shape, "--row", str(options.row), *limit]
    single = ["--batch-size", "1"] if name == "transformers-1" else []
    return [sys.executable, "-m", f"benchmarks.rivals.{MODULES[name]}", *common, *single, *flags]


def run_contender(command: list[str], out: Path, limit_s: float) -> dict[str, Any]:
    """Run a contender to its end, or for `limit_s` seconds; returns its result, or {"failed": one line}."""
    start = time.perf_counter()
    lines: list[str] = []
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ
        )
        code: int | None = None
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also after an interrupt, because it has a session of its own
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        lines = log.read().splitlines()
    process_s = time.perf_counter() - start
    found = result_of(lines, out)
    if found is not None:
        return {**found, "process_s": process_s}
    reason = f"ended by the limit of {limit_s:.0f} s" if code is None else last_words(lines, code)
    return {"failed": reason, "process_s": process_s, "log_end": lines[-15:]}


def result_of(lines: list[str], out: Path) -> dict[str, Any] | None:
    """What a contender measured: its result line, or the record that `flexgen-helm bench` left in `out`."""
    marked = [line for line in lines if line.startswith(MARK)]
    if marked:
        return dict(json.loads(marked[-1][len(MARK) :]))
    for file in out.glob("bench-*.json"):
        record = json.loads(file.read_text())
        row = record["rows"][-1] if record["rows"] else {"error": ""}
        if "error" not in row:
            return {**row, "projected": False, "setup_s": record["load_s"], "plan": record["plan"]}
    return None


def last_words(lines: list[str], code: int) -> str:
    """One line on why a process ended with `code`."""
    said = [line.strip() for line in lines if line.strip()]
    told = [line for line in said if "Error" in line or "error:" in line]
    return f"exit {code}: {(told or said or ['no output'])[-1][:300]}"


def table_line(contender: str, result: dict[str, Any]) -> str:
    """One row of the printed table."""
    if "failed" in result:
        return f"{contender:40.40}  {result['failed']}"
    note = "projected from " if result["projected"] else ""
    if result["projected"]:
        note += f"{result['measured_batches']} batches of {result['batch_size']}, {result['measured_tokens']} tokens"
    return (
        f"{contender:40.40}  {result['seconds']:10.2f} s  {result['new_tokens_s']:9.2f} tokens/s  "
        f"{result['device_reserved_bytes'] / 1e9:6.1f} GB  {note}"
    )


def shape_of(shape: str) -> dict[str, Any]:
    """What a record says about a shape: its name, and the content if it is a file."""
    file = Path(shape)
    return {"shape": file.stem, "changes": json.loads(file.read_text())} if file.is_file() else {"shape": shape}


def parse_flags(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; ends the process with one line if a contender is unknown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-30b")
    parser.add_argument("--row", type=Workload.parse, default="1x64x0+512:32")
    parser.add_argument("--gpu-memory")
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=["flexgen-helm", "accelerate --cut 2 --batches 1"],
        help=f"flexgen-helm, {', '.join(MODULES)}; each may have flags of its own behind it, in one argument",
    )
    parser.add_argument("--limit", type=float, default=240, help="most seconds of one contender")
    parser.add_argument("--name", help="name of the record (default: from shape and memory)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args(arguments)
    for contender in options.contenders:
        if shlex.split(contender)[0] not in ("flexgen-helm", *MODULES):
            parser.error(f"no contender {contender!r}")
    return options


def main() -> None:
    """Run the contenders one after the other; the record is written again after each."""
    options = parse_flags()
    shape = shape_of(options.shape)
    name = options.name or "-".join(filter(None, ("rivals", shape["shape"], options.gpu_memory)))
    content: dict[str, Any] = {
        **shape,
        "row": str(options.row),
        "gpu_memory": options.gpu_memory,
        "contenders": {},
    }
    for contender in options.contenders:
        with tempfile.TemporaryDirectory() as out:
            result = run_contender(command_of(contender, options, Path(out)), Path(out), options.limit)
        content["contenders"][contender] = result
        print(table_line(contender, result), flush=True)
        for line in result.get("log_end", ()):
            print(f"    | {line[:200]}", flush=True)
        path = write_record(name, content, options.out)
    print("published, not run here:")
    for figure in json.loads((HERE / "published.json").read_text()):
        print(f"  {figure['system']}: {figure['new_tokens_s']} tokens/s per {figure['per']} - {figure['work']}")
    print(path)


if __name__ == "__main__":
    main()
