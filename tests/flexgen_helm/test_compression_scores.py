"""Protects: the benchmark of scores under compression runs what it says, counts right, and mixes no two benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_suites import answers, make_suite, run_name, write_run

from benchmarks import compression_scores
from benchmarks.compression import SETTINGS
from benchmarks.helm_client import place_data
from engine import Policy
from flexgen_helm.commands.sweep import parse_sweep_flags
from flexgen_helm.runs.flags import policy_from_flags


def suite(folder: Path, name: str, right: dict[str, list[float]], texts: dict[str, list[str]]) -> Path:
    """A suite whose runs scored `right` and answered `texts`."""
    path = make_suite(folder, name, right)
    for subject, answered in texts.items():
        write_texts(path, subject, answered)
    return path


def write_texts(path: Path, subject: str, texts: list[str]) -> None:
    states = [
        {"request": {"prompt": f"{subject} {at}"}, "result": {"completions": [{"text": text}]}}
        for at, text in enumerate(texts)
    ]
    (path / run_name(subject) / "scenario_state.json").write_text(json.dumps({"request_states": states}))


def test_scores_and_answers_are_counted_by_hand(tmp_path: Path) -> None:
    """Ten questions: one becomes right, three become wrong, and one wrong answer becomes another wrong one."""
    before = suite(
        tmp_path,
        "before",
        {"anatomy": [1.0, 1.0, 1.0, 0.0, 0.0], "astronomy": [1.0, 0.0, 0.0, 0.0, 0.0]},
        {"anatomy": [" A", " A", " A", " B", " B"], "astronomy": [" A", " B", " B", " B", " B"]},
    )
    after = suite(
        tmp_path,
        "after",
        {"anatomy": [0.0, 0.0, 1.0, 0.0, 1.0], "astronomy": [0.0, 0.0, 0.0, 0.0, 0.0]},
        {"anatomy": [" B", " B", " A", " C", " A"], "astronomy": [" B", " B", " B", " B", " B"]},
    )
    found = compression_scores.compare(before, after)
    assert found["runs"] == {"mmlu:subject=anatomy": 0.4, "mmlu:subject=astronomy": 0.0}
    row = found["metrics"]["exact_match"]
    assert (row["questions"], row["scores_changed"], row["answers_changed"]) == (10, 4, 5)
    assert (row["score"], row["change"]) == (pytest.approx(0.2), pytest.approx(-0.2))
    assert row["low"] <= row["change"] <= row["high"]
    assert -0.6 <= row["low"] < 0 < row["high"] <= 0.2
    row = compression_scores.compare(before, before)["metrics"]["exact_match"]
    assert row["answers_changed"] == row["scores_changed"] == row["change"] == row["low"] == row["high"] == 0
    assert row["score"] == pytest.approx(0.4)


def test_metrics_are_told_apart(tmp_path: Path) -> None:
    """One run each, so that there are no means; the answers that changed are those of the metric's own run."""
    one, two = (
        suite(tmp_path, name, {"anatomy": answers(right)}, {"anatomy": [name] * 100})
        for name, right in (("a", 50), ("b", 40))
    )
    for path, others in ((one, " A"), (two, " B")):
        write_run(path, "words", [1.0, 0.0], metric="f1_score")
        write_texts(path, "words", [others, " C"])
    rows = compression_scores.compare(one, two)["metrics"]
    assert rows["exact_match"]["change"] == pytest.approx(-0.1)
    counts = {name: [row[f"{what}_changed"] for what in ("scores", "answers")] for name, row in rows.items()}
    assert counts == {"exact_match": [10, 100], "f1_score": [0, 1]}
    assert (rows["exact_match"]["questions"], rows["f1_score"]["questions"]) == (100, 2)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"anatomy": 9, "astronomy": 9}, {"anatomy": 9}),
        ({"anatomy": 9}, {"anatomy": 8}),
    ],
    ids=["a run is missing", "other questions"],
)
def test_what_is_not_the_same_work_is_refused(before: dict[str, int], after: dict[str, int], tmp_path: Path) -> None:
    one, two = (
        compression_scores.read_suite(make_suite(tmp_path, name, {key: [1.0] * num for key, num in made.items()}))
        for name, made in (("a", before), ("b", after))
    )
    with pytest.raises(SystemExit, match="cannot be compared"):
        compression_scores.changes(one, two)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_sweep_takes_the_command_and_compresses_as_is_said(name: str, tmp_path: Path) -> None:
    entries = ["mmlu:subject=anatomy", "mmlu:subject=astronomy"]
    command = compression_scores.sweep_command(tmp_path, entries, 7, SETTINGS[name])
    assert command[1:4] == ["-m", "flexgen_helm", "sweep"]
    args = parse_sweep_flags(command[4:])
    assert (args.run_entries, args.max_eval_instances, args.skip_completed_runs) == (entries, 7, True)
    policy = Policy.load(policy_from_flags(args))
    assert (policy.compress_weight, policy.compress_cache) == (
        SETTINGS[name].get("compress-weight"),
        SETTINGS[name].get("compress-cache"),
    )


def test_a_directory_serves_one_benchmark(tmp_path: Path) -> None:
    """With other questions, runs that are there already would be skipped and taken for these."""
    asked = {"entries": ["mmlu:subject=anatomy"], "instances": 5}
    for _ in range(2):
        compression_scores.claim(tmp_path / "work", asked)
    with pytest.raises(SystemExit, match="another --work"):
        compression_scores.claim(tmp_path / "work", asked | {"instances": 6})


def test_data_is_placed_again_where_a_benchmark_was_interrupted(tmp_path: Path) -> None:
    for file in (
        "mmlu/dev/anatomy_dev.csv",
        "mmlu/test/anatomy_test.csv",
        "gsm8k/gsm_data_train",
        "gsm8k/gsm_data_test",
    ):
        (tmp_path / "data" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / file).write_text(file)
    placed = tmp_path / "output" / "scenarios" / "mmlu" / "data" / "test" / "anatomy_test.csv"
    for _ in range(2):
        place_data(tmp_path / "data", ["anatomy"], tmp_path / "output", gsm=True)
        assert placed.read_text() == "mmlu/test/anatomy_test.csv"
        placed.unlink()
