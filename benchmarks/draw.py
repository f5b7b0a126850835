"""Draws records as pictures: `python -m benchmarks.draw RECORD.json … --out PICTURE.png` (needs matplotlib).

Records of `flexgen-helm bench --curve` give FlexGen's latency-throughput curve, with a line for each record. Records of
`benchmarks.rivals.run`, one for each number of sequences, give a line for each contender. A record of
`benchmarks.timeline` gives the timeline.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from flexgen_helm.planning.roofline import Workload

COLOURS = {"to device": "tab:blue", "from device": "tab:cyan", "compute": "tab:orange"}


def curve_points(record: dict[str, Any]) -> list[tuple[int, float, float]]:
    """(sequences, seconds, generated tokens per second) of the successful rows of 512 + 32 tokens, by sequences."""
    points = []
    for row in record["rows"]:
        load = Workload.parse(row["row"])
        if "error" not in row and (load.num_runs, load.shared, load.own, load.new) == (1, 0, 512, 32):
            points.append((load.num_jobs, row["seconds"], row["new_tokens_s"]))
    return sorted(points)


def curves(records: list[dict[str, Any]]) -> dict[str, list[tuple[int, float, float]]]:
    """The points of each line, by its label; each GPU and each policy has a line of its own."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for record in records:
        policy = dict(record.get("policy", {}))
        memory = policy.pop("gpu-memory", None) or record.get("gpu_memory")
        cards = " and ".join(sorted({*record.get("hardware", {}).get("accelerators", ())}))
        where = ", ".join([record["shape"], *([_gb(memory)] if memory else []), *([cards] if cards else [])])
        if "contenders" not in record:
            others = [f"{key} {value}" for key, value in policy.items()]
            found.setdefault(", ".join(["flexgen-helm", where, *others]), []).extend(curve_points(record))
        for contender, row in record.get("contenders", {}).items():
            name = contender.split()[0] + (" (projected from a part)" if row.get("projected") else "")
            found.setdefault(f"{name}, {where}", []).extend([] if "failed" in row else curve_points({"rows": [row]}))
    return {label: sorted(points) for label, points in found.items() if points}


def draw_curve(records: list[dict[str, Any]], path: Path) -> None:
    """Draw FlexGen's figure: latency of a block of sequences against throughput, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 6))
    for label, points in curves(records).items():
        _, seconds, rates = zip(*points, strict=True)
        axes.plot(seconds, rates, marker="o", label=label)
        for count, x, y in points:
            axes.annotate(str(count), (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="latency of the whole block, s", ylabel="generated tokens per second")
    axes.set_title("512 in, 32 out; numbers: sequences in the block")
    axes.grid(which="both", alpha=0.3)
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12))
    _save(figure, path)


def draw_timeline(record: dict[str, Any], path: Path, first_ms: float, last_ms: float | None) -> None:
    """Draw one lane for each stream and kind of work; a gap in a lane is idle time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    spans = [dict(zip(record["columns"], values, strict=True)) for values in record["spans"]]
    lanes = sorted({(span["kind"], span["stream"]) for span in spans}, reverse=True)
    figure, axes = pyplot.subplots(figsize=(14, 1.2 + 0.6 * len(lanes)))
    for height, (kind, stream) in enumerate(lanes):
        bars = [
            (span["start_us"] / 1e3, span["duration_us"] / 1e3)
            for span in spans
            if (span["kind"], span["stream"]) == (kind, stream)
        ]
        axes.broken_barh(bars, (height - 0.4, 0.8), facecolors=COLOURS[kind], edgecolors="white", linewidth=0.3)
    axes.set_yticks(range(len(lanes)), [f"{kind} (stream {stream})" for kind, stream in lanes])
    axes.set_xlim(first_ms, last_ms or record["summary"]["wall_ms"])
    axes.set_xlabel("ms")
    memory = record["policy"].get("gpu-memory")
    where = record["shape"] + (f", {_gb(memory)}" if memory else "")
    axes.set_title(f"{where}: {record['row']}, {record['seconds']:.3f} s")
    _save(figure, path)


def _gb(memory: str) -> str:
    """Format a policy's memory limit, which is stored in kB, in GB."""
    from engine.reading import parse_bytes

    return f"{parse_bytes(memory, 'gpu-memory') / 1e9:g} GB"


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Draw the given records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png")
    parser.add_argument("--from-ms", type=float, default=0.0, help="first millisecond of a timeline")
    parser.add_argument("--to-ms", type=float, help="last millisecond of a timeline (default: its end)")
    options = parser.parse_args()
    records = [json.loads(file.read_text()) for file in options.records]
    if "spans" in records[0]:
        draw_timeline(records[0], options.out, options.from_ms, options.to_ms)
    else:
        draw_curve(records, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
