"""The runner hands whole runs to our client, finds beforehand what it can, and is HELM's runner in everything else."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_engine import FakeEngine
from helm.benchmark import runner as helm_runner
from helm.benchmark.executor import ExecutionSpec, ExecutorError
from helm.benchmark.metrics.metric import MetricSpec
from helm.common.authentication import Authentication
from helm.common.cache_backend_config import SqliteCacheBackendConfig
from tiny_models import ours, write_entries

from engine import EngineError
from engine.errors import CapacityError, ConfigError, InstallationError, JobError
from flexgen_helm.helm.request_cache import CacheFull, RequestCache
from flexgen_helm.helm.runner import FlexGenRunner, RunsFailed
from flexgen_helm.workers.engine_processes import engine_processes

RUNNER = "flexgen_helm.runner.FlexGenRunner"
HELLASWAG = "commonsense:dataset=hellaswag,method=multiple_choice_separate_original"
Run = Callable[..., Path]


def entry(host: str, name: str = "runner", scenario: str = "mmlu:subject=anatomy") -> str:
    return f"{scenario},model=local/{name},model_deployment={host}/{name}"


@pytest.fixture
def deployed(tiny_llama: Path, tmp_path: Path, fake_engines: list[FakeEngine]) -> list[FakeEngine]:
    simple = {"class_name": "helm.clients.simple_client.SimpleClient"}
    write_entries(tmp_path / "prod_env", "local/runner", tiny_llama, ours=ours(tiny_llama), simple=simple)
    return fake_engines


def read(runs: Path, file: str = "stats.json", host: str = "ours") -> Any:
    (run,) = [path for path in runs.iterdir() if f"model_deployment={host}_" in path.name]
    return json.loads((run / file).read_text())


def without_times(state: Any) -> Any:
    for request_state in state["request_states"]:
        for name in ("request_time", "request_datetime", "batch_size", "batch_request_time", "cached"):
            request_state["result"].pop(name, None)
    return state


def run_specs_of(*entries: str) -> list[Any]:
    from helm.benchmark.presentation.run_entry import RunEntry
    from helm.benchmark.run import run_entries_to_run_specs

    return run_entries_to_run_specs([RunEntry(each, 1, None) for each in entries], max_eval_instances=4)


def make_runner(tmp_path: Path, output: Path, *, exit_on_error: bool = False, **spec: Any) -> FlexGenRunner:
    local_path = str(tmp_path / "prod_env")
    execution = ExecutionSpec(
        **{"url": None, "auth": Authentication(""), "local_path": local_path, "parallelism": 1, **spec}
    )
    return FlexGenRunner(execution, str(output), "suite", False, False, False, False, exit_on_error)


@pytest.fixture
def registered(deployed: list[FakeEngine], tmp_path: Path) -> list[FakeEngine]:
    from helm.benchmark.config_registry import register_configs_from_directory

    register_configs_from_directory(str(tmp_path / "prod_env"))
    return deployed


def test_a_run_is_one_engine_call_and_equals_the_stock_runners(helm_run: Run, deployed: list[FakeEngine]) -> None:
    stock = helm_run("-r", entry("ours"), "-m", "4", "-n", "4", "--disable-cache", suite="stock")
    num_stock_calls = len(deployed[0].calls)
    whole = helm_run("-r", entry("ours"), "-m", "4", "--disable-cache", "--runner-class-name", RUNNER, suite="whole")
    assert [len(jobs) for jobs in deployed[0].calls[num_stock_calls:]] == [4]
    states = [without_times(read(runs, "scenario_state.json")) for runs in (stock, whole)]
    assert states[0] == states[1]
    assert len(states[0]["request_states"]) == 4
    batch_sizes = [stat["mean"] for stat in read(whole) if stat["name"]["name"] == "batch_size"]
    assert set(batch_sizes) == {4.0}


def test_a_second_run_computes_nothing(helm_run: Run, deployed: list[FakeEngine]) -> None:
    first = helm_run("-r", entry("ours"), "-m", "4", "--runner-class-name", RUNNER, suite="first")
    stats = read(first)
    num_calls = len(deployed[0].calls)
    assert read(helm_run("-r", entry("ours"), "-m", "4", "-n", "2", suite="second")) == stats
    assert len(deployed[0].calls) == num_calls


def test_models_of_other_clients_run_as_helm_runs_them(helm_run: Run, deployed: list[FakeEngine]) -> None:
    stock = helm_run("-r", entry("simple"), "-m", "4", "--disable-cache", suite="stock-simple")
    ours_ = helm_run("-r", entry("simple"), "-m", "4", "--disable-cache", "--runner-class-name", RUNNER, suite="simple")
    states = [without_times(read(runs, "scenario_state.json", "simple")) for runs in (stock, ours_)]
    assert states[0] == states[1]
    assert deployed == []


def test_the_engines_process_starts_before_requests_are_made(
    registered: list[FakeEngine], tmp_path: Path, helm_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(engine_processes, "prepare", lambda: order.append("prepared"))
    monkeypatch.setattr(FlexGenRunner, "run_one", lambda self, run_spec: order.append(run_spec.name))
    specs = run_specs_of(entry("ours"))
    make_runner(tmp_path, helm_data).run_all(specs)
    assert order == ["prepared", specs[0].name]
    for others in ({"dry_run": True}, {}):
        order.clear()
        make_runner(tmp_path, helm_data, **others).run_all(specs if others else run_specs_of(entry("simple")))
        assert len(order) == 1


def test_a_dry_run_loads_nothing(helm_run: Run, deployed: list[FakeEngine]) -> None:
    helm_run("-r", entry("ours"), "-m", "4", "--dry-run", "--runner-class-name", RUNNER, suite="dry")
    assert deployed == []


def test_a_run_through_helms_proxy_server_is_left_to_helm(
    registered: list[FakeEngine], tmp_path: Path, helm_data: Path
) -> None:
    from helm.benchmark.adaptation.request_state import RequestState
    from helm.benchmark.scenarios.scenario import Input, Instance
    from helm.common.request import Request

    request = Request(model="local/runner", model_deployment="ours/runner")
    state = RequestState(Instance(Input(text="x"), [], id="id1"), None, None, 0, None, request, None, 0, False)
    remote = make_runner(tmp_path, helm_data, url="http://localhost:1").executor
    assert remote.client_of([state]) is None
    assert make_runner(tmp_path, helm_data).executor.client_of([state]) is not None


def test_progress_is_told(registered: list[FakeEngine], tmp_path: Path, helm_data: Path) -> None:
    seen: list[tuple[int, int, int]] = []
    runner = make_runner(tmp_path, helm_data)
    runner.progress = lambda *counts: seen.append(counts)
    runner.run_all(run_specs_of(entry("ours")))
    assert seen[0] == (0, 4, 0)
    assert seen[-1][:2] == (4, 4)
    assert seen[-1][2] > 4 * 20


# What fails


def broken(run_spec: Any, class_name: str, **args: Any) -> Any:
    return replace(run_spec, name=f"broken:{class_name}", metric_specs=[MetricSpec(class_name=class_name, args=args)])


@pytest.fixture
def needy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "needy_metric.py").write_text("import package_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "needy_metric.NeedyMetric"


def test_a_metric_that_lacks_a_package_fails_its_run_before_anything_runs(
    registered: list[FakeEngine], tmp_path: Path, helm_data: Path, needy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(FlexGenRunner, "run_one", lambda self, spec: order.append(spec.name))
    (good,) = run_specs_of(entry("ours"))
    with pytest.raises(RunsFailed) as caught:
        make_runner(tmp_path, helm_data).run_all([good, broken(good, needy)])
    assert order == [good.name]
    assert list(caught.value.failures) == [f"broken:{needy}"]
    line = "broken:needy_metric.NeedyMetric: metric NeedyMetric needs the package package_that_is_missing"
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.bad_input
    assert registered == []
    with pytest.raises(InstallationError, match="package_that_is_missing"):
        make_runner(tmp_path, helm_data, exit_on_error=True).run_all([good, broken(good, needy)])
    assert order == [good.name]


@pytest.mark.parametrize(
    ("class_name", "args", "line"),
    [
        ("helm.benchmark.metrics.bias_metrics.BiasMetric", {"mode": "m", "demographic_category": "race"}, "punkt_tab"),
        ("helm.benchmark.metrics.basic_metrics.BasicGenerationMetric", {"names": ["bleu_1"]}, "punkt_tab"),
        ("helm.benchmark.metrics.basic_metrics.BasicGenerationMetric", {"nams": []}, "TypeError: .*'nams'"),
        ("helm.benchmark.metrics.basic_metrics.NoSuchMetric", {}, "NoSuchMetric"),
    ],
)
def test_what_a_metric_lacks_is_said_in_one_line(
    registered: list[FakeEngine], tmp_path: Path, helm_data: Path, class_name: str, args: Any, line: str
) -> None:
    if "BiasMetric" in class_name:
        args = {"mode": "associations", "demographic_category": "race", "target_category": "profession"}
    (good,) = run_specs_of(entry("ours"))
    with pytest.raises(RunsFailed, match=line) as caught:
        make_runner(tmp_path, helm_data).run_all([broken(good, class_name, **args)])
    assert "\n" not in str(caught.value)
    assert registered == []


def test_a_prompt_longer_than_the_window_is_found_before_weights_load(
    tiny_llama: Path, tmp_path: Path, fake_engines: list[FakeEngine], helm_data: Path
) -> None:
    from helm.benchmark.config_registry import register_configs_from_directory

    write_entries(
        tmp_path / "prod_env", "local/runner", tiny_llama, ours=ours(tiny_llama, policy={"pad-to-seq-len": 99})
    )
    register_configs_from_directory(str(tmp_path / "prod_env"))
    with pytest.raises(
        RunsFailed, match=r"4 of 4 requests cannot be run; number 1: .* more than pad-to-seq-len 99"
    ) as caught:
        make_runner(tmp_path, helm_data).run_all(run_specs_of(entry("ours")))
    assert isinstance(next(iter(caught.value.failures.values())), JobError)
    assert caught.value.bad_input
    assert fake_engines == []


def test_a_wrong_deployment_is_bad_input(tiny_llama: Path, tmp_path: Path, helm_data: Path) -> None:
    from helm.benchmark.config_registry import register_configs_from_directory

    write_entries(tmp_path / "prod_env", "local/runner", tiny_llama, ours=ours(tiny_llama, policy={"percents": 1}))
    register_configs_from_directory(str(tmp_path / "prod_env"))
    with pytest.raises(RunsFailed, match="unknown key 'percents'; did you mean 'percent'") as caught:
        make_runner(tmp_path, helm_data).run_all(run_specs_of(entry("ours")))
    assert caught.value.bad_input


def test_a_model_that_does_not_fit_is_bad_input_and_a_fault_is_not(
    registered: list[FakeEngine], tmp_path: Path, helm_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexgen_helm.helm.engines import engines

    def load(path: str, policy: object, window: int | None) -> Any:
        raise errors.pop()

    monkeypatch.setattr(engines, "load", load)
    for error, bad_input in ((CapacityError("59 GB exceed 16 GB"), True), (EngineError("it broke"), False)):
        errors = [error]
        engines.close()
        with pytest.raises(RunsFailed, match=str(error)) as caught:
            make_runner(tmp_path, helm_data, sqlite_cache_backend_config=None).run_all(run_specs_of(entry("ours")))
        assert caught.value.bad_input is bad_input


def test_the_other_runs_go_on_after_one_has_failed(
    registered: list[FakeEngine], tmp_path: Path, helm_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, order = helm_runner.Runner.run_one, []

    def run_one(self: Any, run_spec: Any) -> None:
        order.append(run_spec.name)
        if len(order) == 1:
            raise ExecutorError("no luck")
        stock(self, run_spec)

    monkeypatch.setattr(FlexGenRunner, "run_one", run_one)
    specs = run_specs_of(entry("ours"), entry("ours", scenario=HELLASWAG))
    with pytest.raises(RunsFailed, match="no luck") as caught:
        make_runner(tmp_path, helm_data).run_all(specs)
    assert order == [spec.name for spec in specs]
    assert not caught.value.bad_input
    order.clear()
    runner = make_runner(tmp_path, helm_data, exit_on_error=True)
    with pytest.raises(ExecutorError, match="no luck"):
        runner.run_all(specs)
    assert len(order) == 1


def test_a_full_disk_below_the_cache_ends_all_runs_at_the_first_answers(
    registered: list[FakeEngine], tmp_path: Path, helm_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HELM's cache of tokens, which stands still for good on a full disk, is not written at all."""

    def write(self: Any, rows: Any) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    monkeypatch.setattr(RequestCache, "_write", write)
    cache = tmp_path / "prod_env" / "cache"
    cache.mkdir()
    runner = make_runner(tmp_path, helm_data, sqlite_cache_backend_config=SqliteCacheBackendConfig(str(cache)))
    with pytest.raises(CacheFull, match=r"ours\.sqlite cannot be written .* MB are free there: free some"):
        runner.run_all(run_specs_of(entry("ours"), entry("ours", scenario=HELLASWAG)))
    assert [len(engine.calls) for engine in registered] == [1]
    assert [path.name for path in cache.iterdir()] == ["ours.sqlite"]


def test_errors_are_fatal_or_empty_completions_as_in_helms_executor(
    registered: list[FakeEngine], tmp_path: Path, helm_data: Path
) -> None:
    from helm.benchmark.adaptation.request_state import RequestState
    from helm.benchmark.adaptation.scenario_state import ScenarioState
    from helm.benchmark.executor import Executor
    from helm.benchmark.scenarios.scenario import Input, Instance
    from helm.common.request import Request

    (spec,) = run_specs_of(entry("ours"))
    runner = make_runner(tmp_path, helm_data)
    runner.executor.client_of = lambda states: whole  # type: ignore[method-assign]
    client = runner.executor.context.client._get_client("ours/runner")

    class Unchecked:
        def check(self, requests: Any) -> None:
            pass

        notes = ()
        writes_date = False
        make_requests = staticmethod(client.make_requests)

    whole = Unchecked()

    def states(**bad: Any) -> list[RequestState]:
        requests = [
            Request(model="local/runner", model_deployment="ours/runner", temperature=0.0, max_tokens=2, **fields)
            for fields in ({"prompt": "good"}, {"prompt": "zq " * 700, **bad})
        ]
        return [
            RequestState(Instance(Input(text="x"), [], id=f"id{n}"), None, None, 0, None, request, None, 0, False)
            for n, request in enumerate(requests)
        ]

    survivable = states()
    mine = runner.executor.execute(ScenarioState(spec.adapter_spec, survivable)).request_states
    stock = [Executor.process(runner.executor, state) for state in survivable]
    assert [state.result.completions for state in mine] == [state.result.completions for state in stock]
    assert mine[1].result.completions[0].text == ""
    with pytest.raises(ExecutorError, match=r"1 of 2 requests failed; the first \(instance id1\): PromptError"):
        runner.executor.execute(ScenarioState(spec.adapter_spec, states(echo_prompt=True)))


def test_a_suite_has_one_date_whatever_day_it_goes_on(tmp_path: Path) -> None:
    from flexgen_helm.helm.records.beginning import FILE_NAME, Beginning

    first = Beginning(tmp_path / "suite")
    assert not (tmp_path / "suite").exists()  # until something depends on it
    first.keep()
    (tmp_path / "suite" / FILE_NAME).write_text('{"began": "2026-11-28T23:59:30"}')
    again = Beginning(tmp_path / "suite")
    again.keep()
    assert again.moment == datetime(2026, 11, 28, 23, 59, 30)
    assert [path.name for path in (tmp_path / "suite").iterdir()] == [FILE_NAME]
    (tmp_path / "suite" / FILE_NAME).write_text('{"began": 7}')
    with pytest.raises(ConfigError, match="does not say when the suite began"):
        Beginning(tmp_path / "suite")


def test_a_run_that_goes_on_after_midnight_finds_its_answers(
    helm_run: Run, deployed: list[FakeEngine], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The template writes the date, which was another one when the suite began."""
    from transformers.utils import chat_template_utils

    from flexgen_helm.helm.records import beginning

    dated = shutil.copytree(tiny_llama, tmp_path / "dated")
    (dated / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}")
    write_entries(tmp_path / "prod_env", "local/dated", dated, late=ours(dated))

    def run(clock: datetime) -> list[Any]:
        told = SimpleNamespace(now=lambda: clock, fromisoformat=datetime.fromisoformat)
        monkeypatch.setattr(beginning, "datetime", told)
        monkeypatch.setattr(chat_template_utils, "datetime", told)
        runs = helm_run("-r", entry("late", "dated"), "-m", "2", "--runner-class-name", RUNNER, suite="night")
        states = read(runs, "scenario_state.json", "late")["request_states"]
        return [(state["result"]["cached"], state["result"]["completions"][0]["text"]) for state in states]

    before, after = run(datetime(2026, 11, 28, 23, 59)), run(datetime(2026, 11, 29, 0, 1))
    assert [cached for cached, _ in before] == [False, False]
    assert after == [(True, text) for _, text in before]
