"""Suites made by hand in HELM's layout: each run with its answers, and the record of the sweep."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexgen_helm.planning.environment import Hardware
from flexgen_helm.sweeps.record import (
    ModelRecord,
    RunRecord,
    SweepRecord,
    TimelinePoint,
    TimeSplit,
    write_record,
)

DEPLOYMENT = "flexgen/tiny"
HARDWARE = Hardware(
    device="NVIDIA H100 80GB HBM3", device_memory_bytes=85 * 10**9, host="box", cores=26, host_memory_bytes=232 * 10**9
)
MODEL = ModelRecord(
    deployment=DEPLOYMENT,
    policy={"percent": [20, 80, 0, 100, 0, 100], "compress-weight": False},
    plan={"sequences": 144},
    seconds=100.0,
    limit_s=80.0,
    fraction=0.8,
    requests=400,
    cached=0,
    computed=400,
    prompt_tokens=39_600,
    prefix_tokens_saved=30_000,
    new_tokens=400,
    sweeps=3,
    time_split=TimeSplit(load=20, prefill=60, decode=15, host=5),
    timeline=tuple(
        TimelinePoint(at=20.0 + 10 * n, seconds=10.0, prefill_rows=4000 - n * 1000, decode_rows=100 * n, sequences=144)
        for n in range(3)
    ),
)


def run_name(subject: str, deployment: str = DEPLOYMENT) -> str:
    return f"mmlu:subject={subject},model=local_tiny,model_deployment={deployment.replace('/', '_')}"


def stat(name: str, values: Sequence[float], split: str = "test") -> dict[str, Any]:
    return {"name": {"name": name, "split": split}, "count": len(values), "sum": sum(values),
            "mean": sum(values) / len(values)}  # fmt: skip


def write_run(
    suite: Path, subject: str, values: Sequence[float], *, metric: str = "exact_match", per_instance: bool = True,
    deployment: str = DEPLOYMENT,
) -> str:  # fmt: skip
    """A run that scored `values`, one for each instance."""
    name = run_name(subject, deployment)
    folder = suite / name
    folder.mkdir(parents=True)
    scenario: dict[str, Any] = {"class_name": "helm.benchmark.scenarios.mmlu_scenario.MMLUScenario", "args": {}}
    scenario["args"] = {"subject": subject}
    if metric != "exact_match":
        scenario["class_name"] = "no.such.Scenario"  # so that the first metric that is known is the main one
    content: dict[str, Any] = {
        "run_spec": {
            "name": name,
            "scenario_spec": scenario,
            "adapter_spec": {"model": "local/tiny", "model_deployment": deployment},
            "metric_specs": [],
        },
        "stats": [stat(metric, values), stat("num_instances", [1.0] * len(values))],
        "per_instance_stats": [
            {"instance_id": f"id{at}", "train_trial_index": 0, "stats": [stat(metric, [value])]}
            for at, value in enumerate(values)
        ],
    }
    if not per_instance:
        content["per_instance_stats"] = []
    for file, data in content.items():
        (folder / f"{file}.json").write_text(json.dumps(data))
    return name


def make_suite(
    folder: Path, name: str, answers: Mapping[str, Sequence[float]], *, started: str = "2026-11-21T01:00:00+00:00",
    failed: Mapping[str, str] | None = None, recorded: bool = True, **record: Any,
) -> Path:  # fmt: skip
    """A suite whose runs scored `answers`, those of `failed` with their errors; `record` changes the sweep's record."""
    suite = folder / name
    suite.mkdir(parents=True)
    names = {write_run(suite, subject, values): len(values) for subject, values in answers.items()}
    done = [_run_record(run, count) for run, count in names.items()]
    broken = [
        replace(_run_record(run_name(subject), 0), status="failed", error=error)
        for subject, error in (failed or {}).items()
    ]
    if recorded:
        fields: dict[str, Any] = {
            "suite": name,
            "started": started,
            "finished": started.replace("T01", "T02"),
            "versions": {"flexgen-helm": "0.1.0", "crfm-helm": "0.5.16", "torch": "2.14.1"},
            "commit": "abc123",
            "hardware": HARDWARE,
            "models": (MODEL,),
            "runs": (*done, *broken),
        }
        write_record(suite, SweepRecord(**{**fields, **record}))
    return suite


def _run_record(name: str, requests: int) -> RunRecord:
    return RunRecord(
        name=name,
        deployment=DEPLOYMENT,
        status="done",
        requests=requests,
        cached=0,
        failed_requests=0,
        new_tokens=requests,
        seconds=9.0,
    )


def answers(right: int, of: int = 100, seed: str = "") -> list[float]:
    """So many right answers, always the same ones; with a `seed`, others."""
    order = sorted(range(of), key=lambda at: zlib.crc32(f"{seed}{at}".encode()))
    return [1.0 if at in set(order[:right]) else 0.0 for at in range(of)]
