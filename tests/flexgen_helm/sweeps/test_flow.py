"""Protects: HELM's side in other processes makes the same files; requests are made as far ahead as they are needed."""

from __future__ import annotations

import json
import queue
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_engine import FakeEngine
from question_data import MMLU_SUBJECTS
from sweeping import differences

from engine.errors import EngineError
from engine.job import Job
from engine.workers.handing_out.sharing_out import Room
from flexgen_helm.helm.requests.asked import Work
from flexgen_helm.sweeps import flow, runner
from flexgen_helm.sweeps.beside.helm_side import HelmSide
from flexgen_helm.sweeps.model_sweep import Amount, ModelSweep
from flexgen_helm.sweeps.record import read_record

SUBJECTS = [f"mmlu:subject={subject}" for subject in MMLU_SUBJECTS]
SUITES = Path("benchmark_output/runs")
Cli = Callable[..., int]


def test_runs_made_in_other_processes_are_those_of_helms_run_one(
    cli: Cli, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With processes that are killed on the way, a run that kills each, and metrics: one asks, one is none."""
    plugin = Path("odd_plugin.py")
    shutil.copy(Path(__file__).parents[1] / plugin.name, plugin)
    sampled = f"{SUBJECTS[0]},data_augmentation=misspelling_mild,num_train_trials=1"
    entries = [
        *SUBJECTS[1:],
        sampled,
        "commonsense:dataset=hellaswag,method=multiple_choice_separate_original",
        "odd:asks=yes",
    ]
    common = ("--model", tiny_llama, "-m", 4, "--disable-cache", "--plugins", plugin)
    alone = ("--suite", "alone", "-n", 1)
    assert cli("run", "-r", *entries, "odd:deaths=1", *common, *alone) == 0
    finished_here: list[str] = []
    finish = HelmSide.finish

    def noted(self: HelmSide, adapted: Any, *args: Any) -> None:
        finished_here.append(adapted.run_spec.name.split(",model")[0])
        finish(self, adapted, *args)

    monkeypatch.setattr(HelmSide, "finish", noted)
    monkeypatch.setattr(runner, "num_helpers", lambda num_runs: 2)
    bad = ("odd:deaths=9", "summarization_xsum_sampled:temperature=0.3,device=cpu")
    assert cli("sweep", "-r", *entries, "odd:deaths=1", *bad, *common, "--suite", "beside") == 1
    out = capsys.readouterr().out
    assert f"{len(entries) + 1} done, 2 failed" in out
    failed, lacking = sorted(line for line in out.splitlines() if line.startswith("failed: "))
    assert "metric SummarizationMetric" in lacking
    assert failed.startswith("failed: odd:deaths=9")
    assert "ended 2 times (killed by signal 9)" in failed
    assert differences(SUITES / "beside", SUITES / "alone") == []
    (asking,) = (SUITES / "beside").glob("odd:deaths=0*/stats.json")
    (judged,) = [stat for stat in json.loads(asking.read_text()) if "judge" in stat["name"]["name"]]
    assert judged["sum"] == 3
    assert finished_here == ["odd:deaths=0,asks=yes"]  # where the engine is


def test_a_run_is_made_when_those_before_it_are_answered_where_memory_is_full(
    cli: Cli, tiny_llama: Path, fake_engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    at_rest: list[int] = []
    go_on = threading.Event()
    make, sweeps = HelmSide.make, FakeEngine.sweeps

    class Resting(queue.SimpleQueue):  # type: ignore[type-arg]
        """Notes how many runs are made when nothing is left to be done but to wait for the engine."""

        def get(self, *args: Any, **kwargs: Any) -> Any:
            at_rest.append(len(made))
            go_on.set()
            return super().get(*args, **kwargs)

    def noted(self: HelmSide, run_spec: Any) -> Any:
        made.append(run_spec.name)
        return make(self, run_spec)

    def held(self: FakeEngine, jobs: Any) -> Any:
        go_on.wait()
        return sweeps(self, jobs)

    monkeypatch.setattr(flow, "queue", SimpleNamespace(SimpleQueue=Resting, Empty=queue.Empty))
    monkeypatch.setattr(flow, "MOST_TOKENS", 1)
    monkeypatch.setattr(flow, "FIRST_TOKENS", 1)
    monkeypatch.setattr(HelmSide, "make", noted)
    monkeypatch.setattr(FakeEngine, "sweeps", held)
    assert cli("sweep", "-r", *SUBJECTS, "--model", tiny_llama, "-m", 3, "--suite", "full") == 0
    assert at_rest[0] == 1
    assert len(made) == len(SUBJECTS)
    record = read_record(SUITES / "full")
    assert record is not None
    assert [run.status for run in record.runs] == ["done"] * 3
    assert [len(engine.calls) for engine in fake_engines] == [3]


def test_a_model_that_fails_leaves_room_for_the_next_one(
    cli: Cli, tiny_llama: Path, tiny_gpt2: Path, fake_engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it did not answer counts no longer as made ahead."""
    sweeps = FakeEngine.sweeps

    def failing(self: FakeEngine, jobs: Any) -> Any:
        if self is fake_engines[0]:
            raise EngineError("the card fell off")
        return sweeps(self, jobs)

    monkeypatch.setattr(flow, "MOST_TOKENS", 1)
    monkeypatch.setattr(flow, "FIRST_TOKENS", 1)
    monkeypatch.setattr(FakeEngine, "sweeps", failing)
    for model in (tiny_llama, tiny_gpt2):
        assert cli("register", model) == 0
    entries = [f"{each},model=local/{name}" for name in ("tiny-llama", "tiny-gpt2") for each in SUBJECTS[:2]]
    assert cli("sweep", "-r", *entries, "-m", 2, "--suite", "half") == 1
    record = read_record(SUITES / "half")
    assert record is not None
    assert [run.error for run in record.runs] == ["the card fell off"] * 2 + [None] * 2
    assert [run.status for run in record.runs] == ["failed"] * 2 + ["done"] * 2


def work(name: str, ids: tuple[int, ...], *, num_jobs: int = 1, new: int = 1) -> Work:
    jobs = [Job(prompt=ids, max_new_tokens=new, prompt_logprobs=not new)] * num_jobs
    return Work(name=name, request=None, key={}, places=[], ids=ids, jobs=jobs)  # type: ignore[arg-type]


def test_the_engine_is_given_what_fills_whole_sweeps() -> None:
    sweep = Room(rows=100, jobs=3)
    model = ModelSweep("flexgen/m", None)  # type: ignore[arg-type]
    for number in range(8):
        model._wait(work(str(number), (1, 2, 3)), Amount(tokens=4, jobs=1, rows=3))
    model._wait(work("long", (1,) * 200), Amount(tokens=201, jobs=1, rows=200))
    model._wait(work("last", (1, 2)), Amount(tokens=3, jobs=1, rows=2))
    assert [each.name for each in model.take(sweep)] == [*map(str, range(8)), "long"]  # 3 and 3, then rows are full
    assert [each.name for each in model.take(sweep)] == []
    assert model.under_way == Amount(tokens=8 * 4 + 201 + 3, jobs=10, rows=8 * 3 + 202)
    assert model.under_way.fills(sweep, 3)
    assert not model.under_way.fills(sweep, 4)
    assert [each.name for each in model.take()] == ["last"]
