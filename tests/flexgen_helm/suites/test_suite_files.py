"""Protects: files of a suite's runs are read as HELM wrote them, and never waited for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flexgen_helm.helm import completed
from flexgen_helm.helm.completed import damaged_files, num_unanswered
from flexgen_helm.suites.suite import instance_sums, read_suite

pytestmark = pytest.mark.usefixtures("in_time")

RUN = "mmlu:subject=anatomy,model=local_tiny"
FILES = ("run_spec.json", "scenario.json", "scenario_state.json", "stats.json", "per_instance_stats.json")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "suite" / RUN
    folder.mkdir(parents=True)
    spec = {"adapter_spec": {"model": "local/tiny"}, "scenario_spec": {"class_name": "none.Such"}}
    name = {"name": "exact_match", "split": "test"}
    stats = [{"name": name, "count": 1, "sum": 1.0, "mean": 1.0}]
    (folder / "run_spec.json").write_text(json.dumps(spec))
    (folder / "stats.json").write_text(json.dumps(stats))
    (folder / "per_instance_stats.json").write_text(json.dumps([{"instance_id": "id1", "stats": stats}]))
    return folder


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_is_no_file_of_a_run(name: str, run: Path) -> None:
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    found = read_suite(run.parent).runs[RUN]
    assert (found.value == 1.0) == (name not in ("run_spec.json", "stats.json"))
    assert (instance_sums(found) == {"id1": (1.0, 1.0)}) == name.startswith("scenario")
    assert name in set(damaged_files(run))
    assert num_unanswered(run) == 0


@pytest.mark.parametrize("before", [0, (1 << 20) - 10, (1 << 20) - 3, 3 << 20])
def test_unanswered_requests_are_counted_wherever_they_stand(before: int, run: Path) -> None:
    content = b"x" * before + b'{"success": false}, {"success": true}, {"success": false}' + b"y" * (1 << 20)
    (run / "scenario_state.json").write_bytes(content)
    assert num_unanswered(run) == content.count(b'"success": false') == 2


def test_a_file_without_end_is_not_read_to_its_end(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completed, "MOST_BYTES", 1 << 20)
    with (run / "scenario_state.json").open("wb") as stream:
        stream.truncate(1 << 38)
    assert num_unanswered(run) == 0
    assert "scenario_state.json" in set(damaged_files(run))
