"""The effect of compression on scores: the same HELM runs without and with each compression, question by question.

    python -m benchmarks.compression_scores --data DIR --model DIR --work DIR [--subjects …] [--gsm 100]
        [--instances 100]

The data directory holds `mmlu/{dev,test}/SUBJECT_SPLIT.csv` and, for `--gsm TOKENS`, `gsm8k/gsm_data_{train,test}`.
Each setting is a `flexgen-helm sweep` with an output directory and caches of its own below `--work`, which is kept: a
benchmark that was interrupted continues there. The changes against the uncompressed suite come from `flexgen-helm
compare`: a paired bootstrap over questions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.compression import SETTINGS
from benchmarks.helm_client import add_entry_flags, named_entries, place_data, predictions
from benchmarks.sweep_mmlu import run
from flexgen_helm.helm.scores import short_name
from flexgen_helm.planning.record import write_record
from flexgen_helm.suites.comparison import CONFIDENCE, ScoreChange, compare_suites
from flexgen_helm.suites.suite import Suite, read_suite

ROOT = Path(__file__).resolve().parent.parent
SUITE = "compression"
_AT_ONCE = 128
"""Requests in a sweep, whose work is lost if the benchmark is killed."""


def claim(work: Path, asked: Mapping[str, Any]) -> None:
    """Mark `work` as this benchmark's; raises if it holds runs of other settings."""
    file = work / "asked.json"
    if not file.exists():
        work.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asked, indent=1))
    elif json.loads(file.read_text()) != asked:
        raise SystemExit(f"{work} holds another benchmark ({file} says which); name another --work")


def sweep_command(model: Path, entries: list[str], instances: int, settings: Mapping[str, int]) -> list[str]:
    """The command line of a setting's sweep; complete runs are kept."""
    command = [sys.executable, "-m", "flexgen_helm", "sweep", "-r", *entries, "--model", str(model)]
    command += ["-m", str(instances), "--suite", SUITE, "--skip-completed-runs"]
    command += ["--gpu-batch-size", str(_AT_ONCE), "--num-gpu-batches", "1"]
    return command + [word for flag, bits in settings.items() for word in (f"--{flag}", str(bits))]


def changes(before: Suite, after: Suite) -> dict[str, ScoreChange]:
    """The change of each metric: of the mean over the runs that have it, or of the only one."""
    comparison = compare_suites(before, after, confidence=CONFIDENCE)
    for change in comparison.scores:
        if change.how != "paired":
            reason = change.reason or "its questions are others"
            raise SystemExit(f"{after.path}: {change.name} cannot be compared: {reason}")
    return {change.metric: change for change in (*comparison.scores, *comparison.means)}  # a mean comes last


def answers_changed(before: Suite, after: Suite) -> Counter[str]:
    """Count the answers whose text changed, right or wrong, by the metric of their run."""
    metrics = {name.split(",model")[0]: run.score.metric for name, run in after.runs.items() if run.score}
    pairs = zip(predictions(before.path), predictions(after.path), strict=True)
    return Counter(metrics[one[0]] for one, other in pairs if one != other)


def compare(before: Path, after: Path) -> dict[str, Any]:
    """What the record says about a suite compared with the uncompressed one."""
    base, suite = read_suite(before), read_suite(after)
    found, differing = changes(base, suite), answers_changed(base, suite)
    return {
        "metrics": {
            metric: {
                "score": change.after,
                "change": change.difference,
                "low": change.low,
                "high": change.high,
                "p_value": change.p_value,
                "questions": change.instances,
                "scores_changed": change.changed,
                "answers_changed": differing[metric],
            }
            for metric, change in found.items()
        },
        "runs": {short_name(name): run.value for name, run in suite.runs.items()},
    }


def main() -> None:
    """Sweep each setting, compare, print a table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_entry_flags(parser)
    parser.add_argument("--model-name", help="what the record calls it (default: its directory)")
    parser.add_argument("--work", type=Path, required=True, help="directory of outputs and caches; kept")
    parser.add_argument("--name", help="of the record; default: compression-scores and the model")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    entries = named_entries(parser, options)
    work, model = options.work.resolve(), options.model.resolve()
    claim(work, {"model": str(model), "entries": entries, "instances": options.instances})
    suites: dict[str, Path] = {}
    rows: dict[str, dict[str, Any]] = {}
    print(f"{'':10} {'metric':24} {'score':>7} {'change':>8} {'interval':>18} questions: scores, answers changed")
    for name, settings in SETTINGS.items():
        folder = work / name.replace(" ", "-")
        place_data(options.data, options.subjects, folder / "benchmark_output", gsm=bool(options.gsm))
        done = run(sweep_command(model, entries, options.instances, settings), folder, None)
        if done["exit"]:
            raise SystemExit(f"{name}: the sweep ended with exit code {done['exit']}; see {folder / 'sweep.out'}")
        suites[name] = folder / "benchmark_output" / "runs" / SUITE
        rows[name] = compare(suites["as it is"], suites[name])
        for metric, row in rows[name]["metrics"].items():
            interval = f"{row['low']:+.3f} .. {row['high']:+.3f}"
            print(
                f"{name:10} {metric:24} {row['score']:7.3f} {row['change']:+8.3f} {interval:>18} "
                f"{row['questions']:9} {row['scores_changed']:7} {row['answers_changed']:8}",
                flush=True,
            )
    model_name = options.model_name or model.name
    content = {
        "model": model_name,
        "entries": entries,
        "instances": options.instances,
        "confidence": CONFIDENCE,
        "settings": rows,
    }
    print(write_record(options.name or f"compression-scores-{model_name.lower()}", content, options.out))


if __name__ == "__main__":
    main()
