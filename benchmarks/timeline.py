"""Timelines of calls on the GPU: what was copied and computed when, on which stream.

    python -m benchmarks.timeline --shape opt-30b --rows 1x100x400+100:1 10x100x400+100:1 --gpu-memory 16GB

Recorded by torch.profiler, without code in the engine, and written as compact JSON; draw it with `python -m
benchmarks.draw`. Neighbouring kernels of one stream become one span; large copies stay separate.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flexgen_helm.commands.bench import bench_policy, timed
from flexgen_helm.planning.dummy import open_dummy
from flexgen_helm.planning.record import write_record
from flexgen_helm.planning.roofline import Workload

if TYPE_CHECKING:
    from engine import Engine

Kind = Literal["to device", "from device", "compute"]
KINDS: tuple[Kind, ...] = ("to device", "from device", "compute")
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Span:
    """A time in which a stream was busy with one kind of work."""

    kind: Kind
    stream: int
    start_us: float
    """Since the first event of the recording."""
    duration_us: float
    num_bytes: int = 0
    """Bytes copied, for copies."""
    count: int = 1
    """Number of events."""

    @property
    def end_us(self) -> float:
        """When it ended."""
        return self.start_us + self.duration_us


def spans_of(trace: dict[str, Any], gap_us: float = 20.0, large_bytes: int = 1 << 20) -> list[Span]:
    """The spans of a Chrome trace that torch.profiler exported, by stream and time.

    Events of one kind on one stream that follow each other within `gap_us` are one span, but for copies of at least
    `large_bytes`.
    """
    events = [span for event in trace["traceEvents"] if (span := _span(event)) is not None]
    origin = min((span.start_us for span in events), default=0.0)
    merged: list[Span] = []
    for span in sorted(events, key=lambda span: (span.stream, span.start_us)):
        last = merged[-1] if merged else None
        if (
            last is not None
            and (last.stream, last.kind) == (span.stream, span.kind)
            and span.start_us - origin - last.end_us <= gap_us
            and max(last.num_bytes if last.count == 1 else 0, span.num_bytes) < large_bytes
        ):
            merged[-1] = Span(
                kind=span.kind,
                stream=span.stream,
                start_us=last.start_us,
                duration_us=max(last.end_us, span.end_us - origin) - last.start_us,
                num_bytes=last.num_bytes + span.num_bytes,
                count=last.count + 1,
            )
        else:
            merged.append(_moved(span, -origin))
    return merged


def _span(event: dict[str, Any]) -> Span | None:
    category, arguments = event.get("cat"), event.get("args", {})
    if event.get("ph") != "X" or category not in ("kernel", "gpu_memcpy", "gpu_memset"):
        return None
    kind: Kind = "compute"
    if category == "gpu_memcpy" and "HtoD" in event["name"]:
        kind = "to device"
    elif category == "gpu_memcpy" and "DtoH" in event["name"]:
        kind = "from device"
    return Span(
        kind=kind,
        stream=int(arguments.get("stream", event.get("tid", 0))),
        start_us=float(event["ts"]),
        duration_us=float(event.get("dur", 0)),
        num_bytes=int(arguments.get("bytes", 0)) if kind != "compute" else 0,
    )


def _moved(span: Span, by_us: float) -> Span:
    return Span(**{**vars(span), "start_us": span.start_us + by_us})


def busy_us(spans: list[Span], *kinds: Kind) -> float:
    """Microseconds in which at least one stream is busy with one of `kinds`."""
    busy, end = 0.0, float("-inf")
    for span in sorted((span for span in spans if span.kind in kinds), key=lambda span: span.start_us):
        busy += max(0.0, span.end_us - max(end, span.start_us))
        end = max(end, span.end_us)
    return busy


def summary(spans: list[Span]) -> dict[str, float]:
    """Milliseconds from first to last event, busy with each kind, and idle; bytes copied each way."""
    wall = max((span.end_us for span in spans), default=0.0)
    return {
        "wall_ms": wall / 1e3,
        **{f"{kind} ms".replace(" ", "_"): busy_us(spans, kind) / 1e3 for kind in KINDS},
        "idle_ms": (wall - busy_us(spans, *KINDS)) / 1e3,
        "compute_alone_ms": (busy_us(spans, *KINDS) - busy_us(spans, "to device", "from device")) / 1e3,
        "copy_alone_ms": (busy_us(spans, *KINDS) - busy_us(spans, "compute")) / 1e3,
        **{
            f"{kind} bytes".replace(" ", "_"): sum(span.num_bytes for span in spans if span.kind == kind)
            for kind in KINDS[:2]
        },
    }


def main() -> None:
    """Record a call of each workload, after a rehearsal and a plain call, and write a file for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-30b")
    parser.add_argument("--rows", nargs="+", type=Workload.parse, default=[Workload.parse("1x100x400+100:1")])
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--gpu-memory")
    parser.add_argument("--percent", nargs=6, type=int)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("a timeline needs a CUDA device: on the CPU there are no streams to show")
    policy = bench_policy(options.policy, options.gpu_memory, options.percent)
    with open_dummy(options.shape, policy) as engine:
        for row in options.rows:
            recording = record(engine, row)
            print(
                f"{row}: {recording['seconds']:.3f} s, {recording['recorded_seconds']:.3f} s while recorded, ", end=""
            )
            print(f"{len(recording['spans'])} spans; {recording['summary']}", flush=True)
            content = {"shape": options.shape, "row": str(row), "policy": policy.as_mapping(), **recording}
            parts = ("timeline", options.shape, options.gpu_memory, re.sub(r"\W", "-", str(row)))
            print(write_record("-".join(filter(None, parts)), content, options.out), flush=True)


def record(engine: Engine, row: Workload) -> dict[str, Any]:
    """Time a plain call, and record the spans of another one."""
    from torch.profiler import ProfilerActivity, profile

    timed(engine, row.rehearsal(engine.plan.limits.seats), seed=1)
    plain_s, _ = timed(engine, row)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds, sweeps = timed(engine, row, seed=2)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        spans = spans_of(json.loads(file.read_text()))
    return {
        "seconds": plain_s,
        "recorded_seconds": seconds,
        "sweeps": sweeps,
        "summary": summary(spans),
        "columns": list(Span.__dataclass_fields__),
        "spans": [[round(v, 1) if isinstance(v, float) else v for v in vars(span).values()] for span in spans],
    }


if __name__ == "__main__":
    main()
