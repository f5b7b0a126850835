"""Protects: a sweep's runs are those of single runs, in few passes; what fails leaves the others alone."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from question_data import MMLU_SUBJECTS
from scenario_files import table
from sweeping import SUITE_FILES, differences, final_files

from flexgen_helm import sweep_record
from flexgen_helm.run import main

EASY = "synthetic_reasoning_natural:difficulty=easy"
SUBJECTS = [f"mmlu:subject={subject}" for subject in MMLU_SUBJECTS]
Cli = Callable[..., int]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, helm_data: Path) -> Iterator[Cli]:
    """Run a command line in a directory that has HELM's data."""
    folder = tmp_path / "here"
    (folder / "benchmark_output").mkdir(parents=True)
    (folder / "benchmark_output" / "scenarios").symlink_to(helm_data / "scenarios")
    monkeypatch.chdir(folder)
    handler = logging.NullHandler()
    logging.getLogger("helm").addHandler(handler)
    yield lambda *arguments: main([str(argument) for argument in arguments])
    logging.getLogger("helm").removeHandler(handler)


def suite(name: str) -> Path:
    return Path("benchmark_output/runs") / name


def record_of(name: str) -> sweep_record.SweepRecord:
    found = sweep_record.read(suite(name))
    assert found is not None
    return found


def conf(*entries: str, name: str = "suite.conf") -> str:
    Path(name).write_text("entries: [" + "\n".join(f'{{description: "{each}", priority: 1}}' for each in entries) + "]")
    return name


def test_a_suite_is_what_its_runs_are_one_by_one(
    cli: Cli, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = (*SUBJECTS, EASY, "commonsense:dataset=hellaswag,method=multiple_choice_separate_original")
    sampled = "mmlu:subject=anatomy,model=text,data_augmentation=misspelling_mild,num_train_trials=1"
    common = ("--model", tiny_llama, "-m", 4, "--disable-cache")
    for entry in (*entries, sampled):
        assert cli("run", "-r", entry, *common, "--suite", "alone", "-n", 1) == 0
    capsys.readouterr()
    assert cli("sweep", conf(*entries, sampled), *common, "--suite", "together") == 0
    out = capsys.readouterr().out
    assert "suite together: 6 done, 0 failed, 0 skipped" in out
    assert len(out.splitlines()) < 15
    assert differences(suite("together"), suite("alone")) == []
    assert len(final_files(suite("together"))) == 6 * len(SUITE_FILES)
    assert not Path("benchmark_output/runs/together.partial").exists()

    found = record_of("together")
    assert found.finished is not None
    assert [run.status for run in found.runs] == ["done"] * 6
    (model,) = found.models
    assert (model.deployment, model.cached) == ("flexgen/tiny-llama", 0)
    assert model.requests == sum(run.requests for run in found.runs)
    assert 0 < model.computed <= model.requests
    assert sum(point.prefill_rows for point in model.timeline) + model.prefix_tokens_saved <= model.prompt_tokens
    assert model.prefix_tokens_saved > model.prompt_tokens / 2
    split = model.time_split
    assert split.load + split.prefill + split.decode + split.host == pytest.approx(model.seconds, rel=0.02)
    assert model.plan["limits"]["sequences_per_batch"] > 0

    summarize = Path(sys.executable).with_name("helm-summarize")
    made = subprocess.run([summarize, "--suite", "together"], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert len(json.loads((suite("together") / "runs.json").read_text())) == 6


def test_a_suite_is_one_call_and_what_is_there_twice_is_computed_once(
    cli: Cli, tiny_llama: Path, fake_engines: list[FakeEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    """Groups make another run of an entry, which asks the same."""
    asked, easy = f'description: "{SUBJECTS[0]}"', f'description: "{EASY}"'
    entries = (asked, f"{asked}, groups: [again]", easy, easy)
    Path("twins.conf").write_text("entries: [" + ", ".join(f"{{{entry}}}" for entry in entries) + "]")
    assert cli("sweep", "twins.conf", "--model", tiny_llama, "-m", 3, "--suite", "twins") == 0
    ((jobs,),) = [engine.calls for engine in fake_engines]
    found = record_of("twins")
    assert [run.requests for run in found.runs] == [3, 3, 3]
    assert (found.models[0].requests, found.models[0].computed, len(jobs)) == (9, 6, 6)
    assert "1 run entries are there twice" in capsys.readouterr().out
    one, two = (json.loads((suite("twins") / run.name / "stats.json").read_text()) for run in found.runs[:2])
    assert one == two


def test_several_models_take_turns_the_one_that_shares_most_first(
    cli: Cli, tiny_llama: Path, tiny_gpt2: Path, fake_engines: list[FakeEngine]
) -> None:
    for model in (tiny_llama, tiny_gpt2):
        assert cli("register", model) == 0
    few, many = "model=local/tiny-llama", "model=local/tiny-gpt2"
    assert cli("sweep", "-r", f"{SUBJECTS[0]},{few}", *(f"{each},{many}" for each in SUBJECTS), "-m", 3,
               "--suite", "two") == 0  # fmt: skip
    assert [model.deployment for model in record_of("two").models] == ["flexgen/tiny-gpt2", "flexgen/tiny-llama"]
    assert [len(engine.calls) for engine in fake_engines] == [1, 1]


def test_57_subjects_take_no_more_passes_than_one_of_as_many_requests(
    cli: Cli, tiny_llama: Path, tmp_path: Path
) -> None:
    Path("benchmark_output/scenarios").unlink()
    data = Path("benchmark_output/scenarios/mmlu/data")
    dice = random.Random(1)
    subjects = [f"subject_{n}" for n in range(57)]
    for subject in (*subjects, "all_in_one"):
        for split, count in (("dev", 5), ("val", 1), ("test", 4 if subject != "all_in_one" else 4 * 57)):
            rows = []
            for _ in range(count):
                a, b = dice.randint(2, 999), dice.randint(2, 999)
                rows.append([f"{subject}: {a} plus {b}?", a + b, a - b, a * b, a, "A"])
            table(data / split / f"{subject}_{split}.csv", rows)
    policy = ("--gpu-batch-size", 16, "--num-gpu-batches", 2)
    common = ("--model", tiny_llama, "--disable-cache", *policy)
    assert cli("sweep", "-r", "mmlu:subject=all_in_one", *common, "--suite", "one") == 0
    entries = conf(*(f"mmlu:subject={subject}" for subject in subjects))
    assert cli("sweep", entries, *common, "--suite", "all") == 0
    one, (model,) = record_of("one").models[0], record_of("all").models
    assert model.computed == 57 * 5
    assert one.computed == 4 * 57 + 1
    per_request = one.sweeps / one.computed
    assert model.sweeps / model.computed <= 1.2 * per_request
    alone = ("--suite", "alone", "--runner-class-name", "flexgen_helm.runner.FlexGenRunner", "-n", 1)
    assert cli("run", "-c", entries, *common, *alone) == 0
    assert differences(suite("all"), suite("alone")) == []
