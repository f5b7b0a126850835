"""One device compared with several that share the weights, in one call: seconds, speed-up, and the goal.

    python -m benchmarks.several_gpus [--devices cuda:0 cuda:1] [--settings NAME …] [--out DIR]

Each setting is opened on one device, and then on all of them in each of its ways: *each*, in which every device loads
all weights over its own link from one copy in host memory, and *gather*, in which each loads a part and gathers the
others'. Every device has a process; requests are divided evenly, run by run, and seconds are from submission to the
last answer. Weights are random.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.controlled import Process
from engine.member import Member
from engine.memory.tiers import Memory
from engine.policy import Policy
from flexgen_helm.planning.record import write_record
from flexgen_helm.planning.roofline import Workload

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """A workload, and the speed-up that several devices should reach with it."""

    workload: str
    """The workload of one device; with `each`, the others have as much."""
    each: bool = False
    reach: dict[str, float] | None = None
    """By way: the least speed-up that two devices should reach over one; None without a goal."""


@dataclass(frozen=True)
class Setting:
    """A model and policy, and the workloads to run."""

    shape: str
    policy: dict[str, Any]
    rows: tuple[Row, ...]
    alone: dict[str, Any] | None = None
    """Changes of the policy for the single device, if any."""
    ways: tuple[str, ...] = ("each", "gather")


_SMALL = {"gpu-memory": "16GB"}
SETTINGS = {
    "opt-30b": Setting(
        "opt-30b",
        _SMALL,
        (
            Row("1x100x400+100:1", reach={"gather": 1.04 / 0.60}),
            Row("10x100x400+100:1", reach={"each": 1.88, "gather": 1.88}),
            Row("1x80x0+512:32", each=True, reach={"each": 1.85, "gather": 2.2}),
        ),
    ),
    "opt-30b-4bit": Setting(
        "opt-30b",
        {**_SMALL, "compress-weight": 4, "compress-cache": 4, "weights": {"gpu": 50, "cpu": 50}},
        (Row("1x256x0+512:32", each=True, reach={"each": 1.85, "gather": 1.85}),),
    ),
    "opt-13b-split": Setting(
        "opt-13b",
        {**_SMALL, "weights": {"gpu": 100}},
        (Row("1x100x400+100:1", reach={"gather": 1 / 1.1}),),
        alone={"weights": {"gpu": 100}},
        ways=("gather",),
    ),
}


def serve(shape: str, policy: dict[str, Any]) -> None:
    """Open an engine as the parent says, and run what it sends."""
    from engine.errors import EngineError
    from engine.planning.hardware import available_memory, resolve_device
    from flexgen_helm.planning.dummy import open_dummy

    wanted = Policy.from_mapping(policy)
    memory = available_memory(resolve_device(wanted.device), wanted.gpu_memory, wanted.cpu_memory, None)
    print(json.dumps(asdict(memory)), flush=True)
    told = json.loads(input())
    member = Member(**{**told, "memory": Memory(**told["memory"])}) if told else None
    try:
        start = time.perf_counter()
        with open_dummy(shape, wanted, member) as engine:
            placed = engine.parts.weights.placed_bytes()
            weights = {tier: sum(each[tier] for each in placed.values()) for tier in ("device", "host", "disk")}
            print(
                json.dumps({"weights": weights, "load_s": time.perf_counter() - start, "plan": asdict(engine.plan)}),
                flush=True,
            )
            while asked := json.loads(input()):
                jobs = Workload.parse(asked["workload"]).jobs(engine.parts.model.vocab_size, asked["seed"])
                index, count = asked["index"], asked["count"]
                own = jobs[len(jobs) * index // count : len(jobs) * (index + 1) // count]  # neighbours share prefixes
                before, start = engine.num_sweeps, time.perf_counter()
                done = engine.run(own)
                failed = next((str(each.error) for each in done if each.error is not None), None)
                told = {"error": failed} if failed else {"seconds": time.perf_counter() - start}
                print(json.dumps({**told, "sweeps": engine.num_sweeps - before}), flush=True)
    except EngineError as error:
        print(json.dumps({"error": str(error)}), flush=True)


@contextlib.contextmanager
def opened(setting: Setting, devices: Sequence[str], way: str | None) -> Iterator[tuple[list[Process], dict[str, Any]]]:
    """Engines on `devices` with all weights in place, and what they hold; way: None for one engine alone."""
    policy = setting.policy if way is not None or setting.alone is None else setting.alone
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        handle = os.memfd_create("weights")
        stack.callback(os.close, handle)
        processes = [
            Process("benchmarks.several_gpus", [setting.shape, json.dumps({**policy, "device": device})], [handle])
            for device in devices
        ]
        for process in processes:
            stack.callback(process.end)
        memories = [process.hear() for process in processes]
        least = {**memories[0], **{key: min(each[key] for each in memories) for key in ("device", "host", "disk")}}
        for index, process in enumerate(processes):
            member = {
                "index": index,
                "count": len(devices),
                "gather": way == "gather",
                "memory": least,
                "weights": handle if way == "each" else None,
                "meeting": f"{folder}/meeting" if way == "gather" else None,
            }
            process.tell(member if way else None)
        found = [process.hear() for process in processes]
        own = sum(each["weights"]["host"] for each in found)
        yield (
            processes,
            {
                "load_s": max(each["load_s"] for each in found),
                "plan": found[0]["plan"],
                "weights": [each["weights"] for each in found],
                "host_bytes_of_weights": os.fstat(handle).st_blocks * 512 if way == "each" else own,
            },
        )


def timed(processes: list[Process], row: Row, most_new: int) -> dict[str, Any]:
    """Time a workload with at most so many new tokens, after a rehearsal with two of them."""
    load = Workload.parse(row.workload)
    load = Workload(load.num_runs, load.num_jobs, load.shared, load.own, min(load.new, most_new))
    if row.each:
        load = Workload(load.num_runs, load.num_jobs * len(processes), load.shared, load.own, load.new)
    rehearsal = Workload(load.num_runs, load.num_jobs, load.shared, load.own, min(2, load.new))  # allocates its memory
    for seed, asked in ((1, rehearsal), (0, load)):
        start = time.perf_counter()
        for index, process in enumerate(processes):
            process.tell({"workload": str(asked), "seed": seed, "index": index, "count": len(processes)})
        answers = [process.hear() for process in processes]
        seconds = time.perf_counter() - start
    return {
        "workload": str(load),
        "seconds": seconds,
        "requests_s": load.num_requests / seconds,
        "sweeps": [answer["sweeps"] for answer in answers],
        "each_s": [answer["seconds"] for answer in answers],
    }


def run(name: str, setting: Setting, devices: Sequence[str], most_new: int) -> Iterator[dict[str, Any]]:
    """Time a setting on one device and on all, in each way; prints a line and yields a record for each."""
    base: list[float] = []
    for way in (None, *setting.ways):
        used = devices if way else devices[:1]
        try:
            with opened(setting, used, way) as (processes, found):
                rows = [timed(processes, row, most_new) for row in setting.rows]
        except RuntimeError as error:
            print(f"{name:>16} {way or 'one device':>10}  {error}", flush=True)
            yield {"setting": name, "way": way, "devices": list(used), "error": str(error)}
            continue
        base = base or [row["requests_s"] for row in rows]
        for given, row, one in zip(setting.rows, rows, base, strict=True):
            row["quotient"] = row["requests_s"] / one
            row["reach"] = (given.reach or {}).get(way or "")
            told = f"x {row['quotient']:.2f}" + (f" (reach {row['reach']:.2f})" if row["reach"] else "")
            print(
                f"{name:>16} {way or 'one device':>10} {row['workload']:>20} {row['seconds']:9.3f} s  {told}",
                flush=True,
            )
        print(f"{'':>16} {'':>10} weights in host memory {found['host_bytes_of_weights'] / 1e9:.3f} GB", flush=True)
        yield {"setting": name, "way": way, "devices": list(used), **found, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the settings and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--devices", nargs="+", default=["cuda:0", "cuda:1"], help="one process each; cpu cpu runs, too"
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help=", ".join(SETTINGS))
    parser.add_argument("--shape", help="in place of those of the settings (a small one shows that all of it runs)")
    parser.add_argument("--rows", nargs="+", help="workloads in place of those of the settings, as `bench` has them")
    parser.add_argument("--ways", nargs="+", choices=["each", "gather"], help="default: those of the settings")
    parser.add_argument("--most-new", type=int, default=1 << 20, help="new tokens of a request, at most")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve[0], json.loads(options.serve[1]))
        return
    records = []
    for name in options.settings:
        setting = SETTINGS[name]
        rows = tuple(Row(each) for each in options.rows) if options.rows else setting.rows
        shape = options.shape or setting.shape
        asked = Setting(shape, setting.policy, rows, setting.alone, options.ways or setting.ways)
        for record in run(name, asked, options.devices, options.most_new):
            records.append(record)
            path = write_record("several-gpus", {"runs": records}, options.out)  # at once: the next may take long
        print(path, flush=True)


if __name__ == "__main__":
    main()
