"""Protects: a sweep's runs are those of single runs, in few passes; what fails leaves the others alone."""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
import os
import random
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from question_data import MMLU_SUBJECTS
from scenario_files import table
from sweeping import SUITE_FILES, differences, final_files
from tiny_models import ours, write_entries

from flexgen_helm.runs import launch
from flexgen_helm.sweeps.record import SweepRecord, read_record

EASY = "synthetic_reasoning_natural:difficulty=easy"
SUBJECTS = [f"mmlu:subject={subject}" for subject in MMLU_SUBJECTS]
Cli = Callable[..., int]


def suite(name: str) -> Path:
    return Path("benchmark_output/runs") / name


def record_of(name: str) -> SweepRecord:
    found = read_record(suite(name))
    assert found is not None
    return found


def conf(*entries: str, name: str = "suite.conf") -> str:
    Path(name).write_text("entries: [" + "\n".join(f'{{description: "{each}", priority: 1}}' for each in entries) + "]")
    return name


@pytest.mark.usefixtures("warm_processes")
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

    summarize = [sys.executable, "-m", "helm.benchmark.presentation.summarize", "--suite", "together"]
    made = subprocess.run(summarize, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert len(json.loads((suite("together") / "runs.json").read_text())) == 6
    assert len(served_runs("together")) == 6


def served_runs(name: str) -> list[Any]:
    """What helm-server shows of a suite's runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "helm.benchmark.server", "--port", str(port), "--suite", name]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while server.poll() is None:
            with suppress(OSError):
                address = f"http://127.0.0.1:{port}/benchmark_output/runs/{name}/runs.json"
                with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address) as answer:
                    return list(json.load(answer))
            time.sleep(0.1)
    finally:
        server.kill()
        server.wait()
    raise AssertionError(f"helm-server ended with {server.returncode}")


def test_helms_run_one_is_the_one_that_was_halved() -> None:
    """If this fails, HELM has changed: bring `TwoStepRunner` in line with it, then change the number."""
    from helm.benchmark.runner import Runner

    lines = inspect.getsource(Runner.run_one)
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == "171912e4753e8ce6"


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


def test_runs_of_other_clients_are_run_as_helm_runs_them(
    cli: Cli, tiny_llama: Path, fake_engines: list[FakeEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    simple = {"class_name": "helm.clients.simple_client.SimpleClient"}
    write_entries(Path("prod_env"), "local/both", tiny_llama, ours=ours(tiny_llama), simple=simple)
    entries = [f"{SUBJECTS[0]},model=local/both,model_deployment={host}/both" for host in ("ours", "simple")]
    assert cli("sweep", "-r", *entries, "-m", 3, "--suite", "both") == 0
    assert "2 done, 0 failed" in capsys.readouterr().out
    assert [model.deployment for model in record_of("both").models] == ["ours/both"]
    assert cli("run", "-r", entries[1], "-m", 3, "--suite", "helms", "--disable-cache") == 0
    shutil.rmtree(next(suite("both").glob("*ours_both*")))
    assert differences(suite("both"), suite("helms")) == []


def test_a_prompt_is_tokenized_once_for_helm_and_for_us(
    cli: Cli, tiny_llama: Path, fake_engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """HELM's adapter asks whether it fits and its metrics how long it is; its cache of tokens is not written."""
    from transformers import PreTrainedTokenizerFast

    encoded: list[str] = []
    encode, backend = PreTrainedTokenizerFast._encode_plus, PreTrainedTokenizerFast.backend_tokenizer

    class Watched:
        """A tokenizer of the `tokenizers` package."""

        def __init__(self, found: Any) -> None:
            self.found = found

        def __getattr__(self, name: str) -> Any:
            return getattr(self.found, name)

        def encode_batch_fast(self, texts: list[str], **settings: Any) -> Any:
            encoded.extend(texts)
            return self.found.encode_batch_fast(texts, **settings)

    def watched(self: Any, text: Any, *args: Any, **settings: Any) -> Any:
        encoded.extend([text] if isinstance(text, str) else text)
        return encode(self, text, *args, **settings)

    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", watched)
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "backend_tokenizer", property(lambda self: Watched(backend.__get__(self)))
    )
    assert cli("sweep", "-r", SUBJECTS[0], "--model", tiny_llama, "-m", 3, "--suite", "once") == 0
    (state,) = [json.loads(file.read_text()) for file in suite("once").glob("*/scenario_state.json")]
    prompts = [each["request"]["prompt"] for each in state["request_states"]]
    assert [encoded.count(prompt) for prompt in prompts] == [1] * len(prompts)
    assert {file.name for file in Path("prod_env/cache").iterdir() if file.is_file()} == {"flexgen.sqlite"}


def test_several_models_take_turns_in_the_order_of_their_runs(
    cli: Cli, tiny_llama: Path, tiny_gpt2: Path, fake_engines: list[FakeEngine]
) -> None:
    for model in (tiny_llama, tiny_gpt2):
        assert cli("register", model) == 0
    few, many = "model=local/tiny-llama", "model=local/tiny-gpt2"
    assert cli("sweep", "-r", f"{SUBJECTS[0]},{few}", *(f"{each},{many}" for each in SUBJECTS), "-m", 3,
               "--suite", "two") == 0  # fmt: skip
    assert [model.deployment for model in record_of("two").models] == ["flexgen/tiny-llama", "flexgen/tiny-gpt2"]
    assert [len(engine.calls) for engine in fake_engines] == [1, 1]


def test_many_subjects_take_no_more_passes_than_one_of_as_many_requests(
    cli: Cli, tiny_llama: Path, tmp_path: Path
) -> None:
    Path("benchmark_output/scenarios").unlink()
    data = Path("benchmark_output/scenarios/mmlu/data")
    dice = random.Random(1)
    subjects = [f"subject_{n}" for n in range(19)]
    for subject in (*subjects, "all_in_one"):
        for split, count in (("dev", 5), ("val", 1), ("test", 4 if subject != "all_in_one" else 4 * 19)):
            rows = []
            for _ in range(count):
                a, b = dice.randint(2, 999), dice.randint(2, 999)
                rows.append([f"{subject}: {a} plus {b}?", a + b, a - b, a * b, a, "A"])
            table(data / split / f"{subject}_{split}.csv", rows)
    policy = ("--gpu-batch-size", 8, "--num-gpu-batches", 2)
    common = ("--model", tiny_llama, "--disable-cache", *policy)
    assert cli("sweep", "-r", "mmlu:subject=all_in_one", *common, "--suite", "one") == 0
    entries = conf(*(f"mmlu:subject={subject}" for subject in subjects))
    assert cli("sweep", entries, *common, "--suite", "all") == 0
    one, (model,) = record_of("one").models[0], record_of("all").models
    assert model.computed == 19 * 5
    assert one.computed == 4 * 19 + 1
    per_request = one.sweeps / one.computed
    assert model.sweeps / model.computed <= 1.2 * per_request
    alone = ("--suite", "alone", "--runner-class-name", "flexgen_helm.runner.FlexGenRunner", "-n", 1)
    assert cli("run", "-c", entries, *common, *alone) == 0
    assert differences(suite("all"), suite("alone")) == []


# What fails


def error_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("flexgen-helm: error: ")]


def test_a_run_that_fails_leaves_the_others_alone_and_is_run_again(
    cli: Cli, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Missing data, a metric without its package, and prompts that do not fit."""
    broken = (
        "custom_mcqa:path=nowhere.jsonl,num_train_instances=0",
        "summarization_xsum_sampled:temperature=0.3,device=cpu",
    )
    command = ("sweep", "-r", EASY, *broken, SUBJECTS[0], "--model", tiny_llama, "-m", 2, "--suite", "some")
    assert cli(*command) == 1
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if "error" in line and "run " not in line]
    assert line.startswith("flexgen-helm: error: 2 of 4 runs failed: ")
    assert "Traceback" not in captured.err + captured.out
    assert "suite some: 2 done, 2 failed, 0 skipped" in captured.out
    assert len([line for line in captured.out.splitlines() if line.startswith("failed: ")]) == 2
    assert "nowhere.jsonl" in captured.out
    statuses = {run.name.split(",")[0].split(":")[0]: run.status for run in record_of("some").runs}
    assert statuses["synthetic_reasoning_natural"] == statuses["mmlu"] == "done"
    assert sorted(statuses.values()) == ["done", "done", "failed", "failed"]
    assert not list(suite("some").glob("custom_mcqa*"))

    assert cli(*command, "--skip-completed-runs") == 1
    assert "suite some: 0 done, 2 failed, 2 skipped" in capsys.readouterr().out


def test_runs_with_failed_requests_are_marked_and_fail_the_sweep(
    cli: Cli, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one run every request fails, of another some do: a token of theirs has no finite embedding."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    common = ("-m", 3, "--suite", "some")
    assert cli("sweep", conf(*SUBJECTS[:2]), "--model", tiny_llama, *common) == 0
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    asked = [
        json.loads(file.read_text())["request_states"] for file in sorted(suite("some").glob("*/scenario_state.json"))
    ]
    ids = [[set(tokenizer(each["request"]["prompt"])["input_ids"]) for each in states] for states in asked]
    counts = [{token: sum(token in each for each in of_run) for token in set().union(*of_run)} for of_run in ids]
    bad = next(
        token
        for one, other in (counts, counts[::-1])
        for token in sorted(one)
        if one[token] == 3 and 0 < other.get(token, 0) < 3
    )
    broken = shutil.copytree(tiny_llama, tmp_path / "half-broken")
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = float("nan")
    model.save_pretrained(broken)
    capsys.readouterr()
    flags = ("-m", 3, "--suite", "broken", "--disable-cache")  # the two models differ in one row
    assert cli("sweep", conf(*SUBJECTS[:2]), "--model", broken, *flags) == 1
    told = capsys.readouterr()
    assert "suite broken: 1 done, 1 failed" in told.out
    assert "all 3 requests failed; the first: NumericsError" in told.out
    assert "failed requests" in told.out
    assert "requests failed and count as empty answers" in told.out
    assert "2 of 2 runs failed" in told.err
    (failed, done) = sorted(record_of("broken").runs, key=lambda run: run.status != "failed")
    assert (failed.failed_requests, done.status) == (3, "done")
    assert 0 < done.failed_requests < 3
    assert cli("compare", suite("some"), suite("broken")) == 1
    assert "requests failed and count as empty" in capsys.readouterr().out


def test_a_prompt_that_does_not_fit_fails_its_run_only(
    cli: Cli, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("sweep", "-r", "simple_mcqa:max_train_instances=0", EASY, "--model", tiny_llama, "-m", 1)
    assert cli(*command, "--pad-to-seq-len", 200, "--suite", "padded") == 1
    out = capsys.readouterr().out
    assert "1 done, 1 failed" in out
    assert "more than pad-to-seq-len 200" in out


def test_a_fault_of_the_engine_keeps_what_was_answered(
    cli: Cli, tiny_llama: Path, fake_engines: list[FakeEngine],
    failing_engines: Callable[..., AbstractContextManager[None]], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from engine import EngineError

    command = ("sweep", "-r", *SUBJECTS, "--model", tiny_llama, "-m", 3, "--suite", "faulty")
    with failing_engines(EngineError("the card fell off"), 5):
        assert cli(*command) == 1
    assert "1 done, 2 failed" in capsys.readouterr().out
    assert {run.error for run in record_of("faulty").runs} == {None, "the card fell off"}
    assert cli(*command) == 0
    assert "3 done, 0 failed" in capsys.readouterr().out
    assert [len(jobs) for engine in fake_engines for jobs in engine.calls] == [9, 4]
    assert record_of("faulty").models[0].cached == 5


def test_a_model_that_cannot_be_loaded_fails_its_runs_and_its_weights_are_not_read_for_the_record(
    cli: Cli, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine import EngineError
    from flexgen_helm.helm import engines

    def refuse(*_: Any) -> Any:
        raise EngineError("no card is there")

    engines.engines.close()  # an earlier test's would have been identified
    with monkeypatch.context() as patched:
        patched.setattr(engines.engines, "load", refuse)
        patched.setattr(engines, "weights_digest", None)
        assert cli("sweep", "-r", *SUBJECTS, "--model", tiny_llama, "-m", 2, "--suite", "unread") == 1
    engines.engines.close()  # what failed once fails again
    assert [run.error for run in record_of("unread").runs] == ["no card is there"] * len(SUBJECTS)
    assert record_of("unread").models[0].identity == {}
    assert cli("sweep", "-r", *SUBJECTS, "--model", tiny_llama, "-m", 2, "--suite", "unread") == 0
    assert len(record_of("unread").models[0].identity["weights"]) == 64


def test_an_error_that_nobody_expected_leaves_the_other_models_alone(
    cli: Cli, tiny_llama: Path, tiny_gpt2: Path, fake_engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from flexgen_helm.helm.client import FlexGenClient

    for model in (tiny_llama, tiny_gpt2):
        assert cli("register", model) == 0
    respond = FlexGenClient._response

    def response(self: FlexGenClient, *args: Any) -> Any:
        if self._model == str(tiny_gpt2):
            raise IndexError("odd")
        return respond(self, *args)

    monkeypatch.setattr(FlexGenClient, "_response", response)
    entries = [f"{SUBJECTS[0]},model=local/{name}" for name in ("tiny-llama", "tiny-gpt2")]
    entries.append(f"{SUBJECTS[1]},model=local/tiny-gpt2")  # this model comes first
    assert cli("sweep", "-r", *entries, "-m", 3, "--suite", "odd") == 1
    captured = capsys.readouterr()
    assert "1 done, 2 failed" in captured.out
    assert "Traceback" not in captured.err + captured.out
    found = record_of("odd")
    assert found.finished is not None
    assert [run.error for run in found.runs] == [None, "IndexError: odd", "IndexError: odd"]
    assert "Traceback" in (suite("odd") / "flexgen_sweep.log").read_text()


def test_the_first_error_is_its_runs_own_where_it_ends_the_sweep(
    cli: Cli, tiny_llama: Path, fake_engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from engine import EngineError
    from flexgen_helm.sweeps.runner import SweepRunner

    def finish(self: Any, *args: Any) -> None:
        raise EngineError("no such number")

    monkeypatch.setattr(SweepRunner, "finish", finish)
    command = ("sweep", "-r", *SUBJECTS, "--model", tiny_llama, "-m", 2, "--suite", "first", "--exit-on-error")
    assert cli(*command) == 1
    assert error_lines(capsys) == ["flexgen-helm: error: no such number"]
    assert [run.error for run in record_of("first").runs] == ["no such number"]


def test_a_run_whose_statistics_were_torn_is_run_again(
    cli: Cli, tiny_llama: Path, fake_engines: list[FakeEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    """As HELM leaves them when it is killed: all its files are there, and HELM would count it as completed."""
    command = ("sweep", "-r", *SUBJECTS[:2], "--model", tiny_llama, "-m", 2, "--suite", "torn", "--skip-completed-runs")
    assert cli(*command) == 0
    next(suite("torn").glob("*/stats.json")).write_text('[{"na')
    capsys.readouterr()
    assert cli(*command) == 0
    out = capsys.readouterr().out
    assert "1 done, 0 failed, 1 skipped" in out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("mmlu:")].count("none") == 0


def test_an_output_directory_that_fills_up_stops_the_sweep(
    cli: Cli, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno

    from flexgen_helm.helm import two_step_runner

    write, written = two_step_runner.write, []

    def full(path: str, content: str) -> None:
        written.append(path)
        write(path, content[: len(content) // 2 if len(written) > 7 else None])
        if len(written) > 7:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(two_step_runner, "write", full)
    command = ("sweep", "-r", *SUBJECTS, "--model", tiny_llama, "-m", 2, "--suite", "full", "--skip-completed-runs")
    assert cli(*command) == 1
    captured = capsys.readouterr()
    assert "No space left on device" in captured.err
    assert "MB are free" in captured.err
    assert "1 done" in captured.out
    assert len(final_files(suite("full"))) == len(SUITE_FILES)  # of one run, whole
    assert record_of("full").finished is None
    monkeypatch.setattr(two_step_runner, "write", write)
    assert cli(*command) == 0
    assert "2 done, 0 failed, 1 skipped" in capsys.readouterr().out
    assert len(final_files(suite("full"))) == 3 * len(SUITE_FILES)


def test_a_sweep_stopped_by_hand_keeps_the_sweep_under_way(
    cli: Cli, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flexgen_helm.sweeps.runner import SweepRunner

    def interrupted(self: Any, *args: Any) -> None:
        raise KeyboardInterrupt

    command = ("sweep", "-r", *SUBJECTS, "--model", tiny_llama, "-m", 2, "--suite", "stopped", "--gpu-batch-size", 2,
               "--num-gpu-batches", 1)  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(SweepRunner, "finish", interrupted)
        assert cli(*command) == 130
    assert "run the same command to continue" in capsys.readouterr().err
    assert cli(*command) == 0
    model = record_of("stopped").models[0]
    assert model.cached >= 2
    assert model.cached + model.computed == model.requests


@pytest.mark.parametrize("command", ["sweep", "run"])
def test_a_command_whose_time_is_up_keeps_the_pass_at_hand_and_goes_on(
    command: str, cli: Cli, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Time is up as soon as the engine has told how long a pass takes; what it answered by then is not asked again."""
    from flexgen_helm.terminal import deadline

    told: list[float] = []
    asked: list[int] = []

    def left_s(self: Any) -> float:
        longest: float = self._longest_pass_s()
        told.extend([longest] if longest else [])
        return -1.0 if longest else 1.0

    monkeypatch.setattr(deadline.Deadline, "left_s", left_s)
    monkeypatch.setattr(deadline, "_LOOK_S", 0.001)
    watch_deliveries(monkeypatch, asked)
    flags = ("-r", *SUBJECTS, "--model", tiny_llama, "-m", 4, "--suite", "up", "--gpu-batch-size", 1,
             "--num-gpu-batches", 1)  # fmt: skip
    assert cli(command, *flags, "--stop-before", "23:30") == 75
    (line,) = error_lines(capsys)
    assert "not finished, its time was up; answers so far are kept, run the same command to continue" in line
    assert told
    assert told[0] > 0
    first = sum(asked)
    asked.clear()
    assert first > 0
    assert answers_in_cache() == first
    monkeypatch.setattr(deadline.Deadline, "left_s", lambda self: 60.0)
    assert cli(command, *flags, "--stop-before", "23:30") == 0
    assert sum(asked) > 0
    assert answers_in_cache() == first + sum(asked)
    assert len(final_files(suite("up"))) == len(SUBJECTS) * len(SUITE_FILES)


def answers_in_cache() -> int:
    with sqlite3.connect("prod_env/cache/flexgen.sqlite") as connection:
        return int(connection.execute("SELECT count(*) FROM unnamed").fetchone()[0])


def watch_deliveries(monkeypatch: pytest.MonkeyPatch, asked: list[int]) -> None:
    """Make every pass take 50 ms at least, and note how many answers it delivers."""
    from engine.executor import Executor
    from engine.sweep_loop import SweepLoop

    pass_over, deliver = Executor.sweep, SweepLoop._deliver

    def slowly(self: Any, *args: Any) -> Any:
        time.sleep(0.05)
        return pass_over(self, *args)

    def noted(self: Any, done: Any) -> None:
        done = list(done)
        asked.append(len(done))
        deliver(self, done)

    monkeypatch.setattr(Executor, "sweep", slowly)
    monkeypatch.setattr(SweepLoop, "_deliver", noted)


def test_a_sweep_stopped_by_hand_while_the_model_loads_computes_nothing_more(
    cli: Cli, tiny_llama: Path, fake_engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine import Completion, EngineError, Job
    from flexgen_helm.helm.engines import engines
    from flexgen_helm.sweeps.runner import SweepRunner

    answered: list[int] = []

    class SlowEngine(FakeEngine):
        """Takes half a second for each job, until it is closed."""

        def sweeps(self, jobs: Sequence[Job]) -> Iterator[list[tuple[int, Completion]]]:
            for index, job in enumerate(list(jobs)):
                time.sleep(0.5)
                if self.closed:
                    raise EngineError("the engine is closed")
                answered.append(index)
                yield [(index, self.answer(job))]

    load = engines.load

    def slowly(path: str, policy: Any, window: int | None) -> SlowEngine:
        time.sleep(0.5)
        return SlowEngine(load(path, policy, window).tokenizer)  # type: ignore[attr-defined]

    def interrupted(self: Any, *args: Any) -> None:
        raise KeyboardInterrupt

    command = ("sweep", "--model", tiny_llama, "-m", 2, "--suite", "early", "-r")
    assert cli(*command, SUBJECTS[0]) == 0
    engines.close()
    monkeypatch.setattr(engines, "load", slowly)
    monkeypatch.setattr(SweepRunner, "finish", interrupted)  # of the run that is known
    assert cli(*command, *SUBJECTS) == 130
    assert len(answered) <= 1
    assert not [thread for thread in threading.enumerate() if thread.name == "flexgen-sweep"]


# One at a time


def test_a_second_sweep_on_a_suite_is_told_who_holds_it(
    cli: Cli, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flexgen_helm.sweeps.lock import SuiteLock

    command = ("sweep", "-r", EASY, "--model", tiny_llama, "-m", 1, "--suite", "held")
    program = f"""
import sys, time
from pathlib import Path
from flexgen_helm.sweeps.lock import SuiteLock
with SuiteLock(Path({str(suite("held").absolute())!r})):
    print("held", flush=True)
    time.sleep(600)
"""
    root = str(Path(__file__).resolve().parents[3])
    environment = {**os.environ, "PYTHONPATH": root}
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = sorted(Path().rglob("*"))
        assert cli(*command) == 2
        (line,) = error_lines(capsys)
        assert f"another sweep is running in suite held: process {holder.pid} on " in line
        assert ", since 20" in line
        assert sorted(Path().rglob("*")) == before
        assert cli(*command, "--suite", "other") == 0
    finally:
        holder.kill()
        holder.wait()
    with SuiteLock(suite("held")):  # its owner is dead
        pass
    assert cli(*command) == 0


def test_a_lock_whose_file_is_gone_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the file and locking it, its holder gives up, removes it, and another makes a new one."""
    from flexgen_helm.sweeps import lock

    flock, others = fcntl.flock, []

    def late(handle: int, operation: int) -> None:
        if not others:
            (tmp_path / lock.FILE_NAME).unlink()
            others.append(os.open(tmp_path / lock.FILE_NAME, os.O_RDWR | os.O_CREAT))
            flock(others[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        flock(handle, operation)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with pytest.raises(lock.SuiteHeld), lock.SuiteLock(tmp_path):
        pass
    os.close(others[0])
    with lock.SuiteLock(tmp_path):
        pass


@pytest.mark.parametrize("refusal", ["the same suite", "a log that cannot be written", "an unknown scenario"])
def test_a_refused_sweep_leaves_alone_what_another_made_meanwhile(
    refusal: str, cli: Cli, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both begin where nothing is; one is quicker."""
    from flexgen_helm.sweeps.lock import SuiteLock

    prepare, other = launch.prepare, SuiteLock(suite("same" if "suite" in refusal else "other"))
    kept = Path("prod_env/model_metadata.yaml")

    def meanwhile(*args: Any) -> Any:
        try:
            return prepare(*args)
        finally:
            kept.parent.mkdir()
            kept.write_text("models: []")
            other.__enter__()

    monkeypatch.setattr(launch, "prepare", meanwhile)
    more = ("--json-log", "no/such/log") if "log" in refusal else ()
    entry = "no_such_scenario" if "unknown" in refusal else EASY
    assert cli("sweep", "-r", entry, "--model", tiny_llama, "-m", 1, "--suite", "same", *more) == 2
    assert kept.read_text().startswith("models:")
    assert other._path.exists()
    other.__exit__(None, None, None)


# Bad input


BAD: dict[str, tuple[list[str], list[str]]] = {
    "nothing": ([], ["name a file of run entries"]),
    "unknown entries": (
        ["-r", "mmul:subject=anatomy", EASY, "mmul", "simple_mcqa:model=no/such", "simpel_mcqa"],
        ["2 things are wrong", "(1) HELM has no run entry 'mmul'", "did you mean simple_mcqa"],
    ),
    "unknown models and arguments": (
        ["-r", EASY, "simple_mcqa:model=no/such", "synthetic_reasoning:mode=sideways",
         "simple_mcqa:model=no/such,max_train_instances=1"],
        ["3 things are wrong", "model no/such", "sideways"],
    ),
    "an empty file": (["empty.conf"], ["empty.conf has no run entries"]),
    "a file of nothing": (["nothing.conf"], ["nothing.conf is not a file of run entries"]),
    "a path as suite": (["-r", EASY, "--suite", "a/b"], ["suite 'a/b' is no name of a directory"]),
    "a suite above": (["-r", EASY, "--suite", ".."], ["suite '..' is no name"]),
    "a line end in the suite": (["-r", EASY, "--suite", "a\nb"], ["suite 'a\\nb' is no name", "printed"]),
    "a nothing in the suite": (["-r", EASY, "--suite", "a\0b"], ["is no name of a directory"]),
    "a long suite": (["-r", EASY, "--suite", "é" * 124], ["has 248 bytes; take one of at most 247"]),
    "a suite of scratch": (["-r", EASY, "--suite", "a.partial"], ["leave .partial out"]),
    "no suite": (["-r", EASY, "--suite", ""], ["name the suite"]),
    "a dry run": (["-r", EASY, "--dry-run"], ["--dry-run is not for sweeps"]),
    "a log that cannot be written": (["-r", EASY, "--json-log", "no/such/log"], ["--json-log no/such/log cannot"]),
    "different runs with the same name": (
        ["-r", "simple_mcqa:temperature=0.1", "simple_mcqa:temperature=0.2"],
        ["different runs with the same name"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input(case: str, cli: Cli, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.conf").write_text("entries: []")
    Path("nothing.conf").write_text("")
    arguments, said = BAD[case]
    before = sorted(path for path in Path().rglob("*") if "scenarios" not in path.parts)
    code = cli("sweep", "--model", tiny_llama, *(["--suite", "bad"] if "--suite" not in arguments else []), *arguments)
    (line,) = error_lines(capsys)
    assert code == 2
    for part in said:
        assert part in line
    assert sorted(path for path in Path().rglob("*") if "scenarios" not in path.parts) == before


def test_a_cache_without_a_directory(cli: Cli, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prod_env").mkdir()
    Path("prod_env/cache").write_text("")
    assert cli("sweep", "-r", EASY, "--model", tiny_llama, "-m", 1, "--suite", "bad") == 2
    (line,) = error_lines(capsys)
    assert line.endswith("prod_env/cache is not a directory")
    assert not suite("bad").exists()


def test_a_corrupt_cache_is_set_aside_and_the_suite_computed_anew(
    cli: Cli, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("sweep", "-r", EASY, "--model", tiny_llama, "-m", 2, "--suite", "corrupt")
    assert cli(*command) == 0
    cache = Path("prod_env/cache/flexgen.sqlite")
    cache.write_bytes(b"no database at all" * 999)
    assert cli(*command) == 0
    assert record_of("corrupt").models[0].computed == 2
    (aside,) = cache.parent.glob("flexgen.sqlite.corrupt-*")
    assert str(aside) in (suite("corrupt") / "flexgen_sweep.log").read_text()
    assert cli(*command) == 0
    assert record_of("corrupt").models[0].cached == 2


def test_a_cache_that_another_process_has_locked_stops_before_a_weight_is_read(
    cli: Cli, tiny_llama: Path, fake_engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from flexgen_helm.helm import kept_answers
    from flexgen_helm.helm.request_cache import RequestCache

    monkeypatch.setattr(kept_answers, "RequestCache", lambda config: RequestCache(config, wait_s=0.05))
    Path("prod_env/cache").mkdir(parents=True)
    other = sqlite3.connect("prod_env/cache/flexgen.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert cli("sweep", "-r", EASY, "--model", tiny_llama, "-m", 2, "--suite", "locked") == 1
    assert "flexgen.sqlite is locked by another process" in capsys.readouterr().out
    assert fake_engines == []
    other.close()
