"""Tiny models with their own tokenizers, HELM's data in its own layout, and HELM run inside this process."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import helm.benchmark.metrics.bias_metrics  # noqa: F401 - NLTK keeps the output stream of its first import
import pytest
import scenario_data
from fake_engine import FakeEngine
from few_questions import begin_with_few
from helm.benchmark import run
from helm.benchmark.scenarios.synthetic_reasoning_natural_scenario import SRNScenario
from in_this_process import load_in_this_process
from tiny_models import random_gpt2, random_llama, random_opt, save_tiny_model

from engine import EngineError
from flexgen_helm.planning.auto_policy import resources_here
from flexgen_helm.runs import launch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

HERE = Path(__file__).parent
WITHOUT_HELM = {
    "test_bootstrap",
    "test_complete",
    "test_complete_openai",
    "test_lm_eval",
    "test_overlap",
    "test_plan",
    "test_sweep_record",
}
"""Tests of what imports no HELM: their warnings are errors, as elsewhere."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # HELM and what it imports warn about themselves
        if HERE in item.path.parents and item.path.stem not in WITHOUT_HELM:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(autouse=True, scope="session")
def _engines_in_this_process() -> Iterator[None]:
    """A process for each engine would import torch anew; `test_engine_processes` and the command line have them.

    HELM's side is in this process, too, however many cores there are; `test_flow` has it in others.
    """
    from flexgen_helm.helm.engines import engines
    from flexgen_helm.workers import helper_processes
    from flexgen_helm.workers.engine_processes import engine_processes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "load", load_in_this_process)
        patch.setattr(engine_processes, "load", load_in_this_process)
        patch.setattr(engine_processes, "prepare", lambda: None)
        patch.setattr(engine_processes, "resources", resources_here)
        patch.setattr(engine_processes, "last_resources", resources_here)
        patch.setattr(helper_processes, "usable_cores", lambda: 1)
        yield


@pytest.fixture(autouse=True, scope="session")
def _own_digests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Digests of tiny models are not kept among the user's."""
    from engine.checkpoint.identity import kept_digests

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("digests")
        patch.setattr(kept_digests, "digests_directory", lambda: folder)
        yield


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory whose tokenizer adds no special tokens."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", random_llama)


@pytest.fixture(scope="session")
def tiny_llama_with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but its tokenizer begins every text with "</s>", which is also HELM's prefix token, as for OPT."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama-with-bos", random_llama, adds_bos=True)


@pytest.fixture(scope="session")
def tiny_opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OPT, whose tokenizer begins every text with "</s>"."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-opt", random_opt, adds_bos=True)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-gpt2", random_gpt2)


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template."""
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-chat", random_llama, chat_template=template)


@pytest.fixture
def fake_engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeEngine]]:
    """Make every engine loaded during the test a `FakeEngine`; the list holds them in the order of loading."""
    from transformers import AutoTokenizer

    from flexgen_helm.helm.engines import engines

    loaded: list[FakeEngine] = []

    def load(path: str, policy: object, window: int | None = None) -> FakeEngine:
        loaded.append(FakeEngine(AutoTokenizer.from_pretrained(path)))
        return loaded[-1]

    engines.close()
    monkeypatch.setattr(engines, "load", load)
    yield loaded
    for engine in loaded:
        engine.let_go.set()
    engines.close()


@pytest.fixture
def failing_engines(fake_engines: list[FakeEngine]) -> Callable[[EngineError, int], AbstractContextManager[None]]:
    """Inside, every engine that is loaded fails after so many completions; behind it, engines are loaded anew."""
    from flexgen_helm.helm.engines import engines

    @contextmanager
    def failing(fault: EngineError, after: int) -> Iterator[None]:
        load = engines.load

        def faulty(path: str, policy: Any, window: int | None) -> FakeEngine:
            engine = load(path, policy, window)
            assert isinstance(engine, FakeEngine)
            engine.fault, engine.fault_after = fault, after
            return engine

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engines, "load", faulty)
            yield
        engines.close()

    return failing


@pytest.fixture
def make_client(tiny_llama: Path, tmp_path: Path) -> Callable[..., Any]:
    """Make clients of tiny-llama (or of `model`) as HELM makes them, with a cache below the test's directory."""
    from helm.common.cache import BlackHoleCacheConfig, SqliteCacheConfig
    from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer

    from flexgen_helm.helm.client import FlexGenClient

    def make(*, model: Path = tiny_llama, cache: str | None = "cache.sqlite", **args: Any) -> FlexGenClient:
        tokenizer = HuggingFaceTokenizer(BlackHoleCacheConfig(), f"test{model}", str(model))
        return FlexGenClient(
            cache_config=SqliteCacheConfig(str(tmp_path / cache)) if cache else BlackHoleCacheConfig(),
            tokenizer=tokenizer,
            tokenizer_name=f"test{model}",
            model_name="local/tiny",
            **{"end_of_text_token": "</s>", "pretrained_model_name_or_path": str(model), **args},
        )

    return make


@pytest.fixture
def in_time() -> Iterator[None]:
    """Fails a test that waits."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# HELM itself


@pytest.fixture(scope="session")
def helm_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output directory with small data of many scenarios where HELM puts its downloads."""
    output = tmp_path_factory.mktemp("benchmark_output")
    words = output / "nltk" / "tokenizers" / "punkt_tab"
    words.mkdir(parents=True)  # keeps HELM from trying to download it
    os.environ["NLTK_DATA"] = str(output / "nltk")
    scenario_data.place(output)
    return output


@pytest.fixture(autouse=True, scope="session")
def register_helms_configs() -> Iterator[Callable[[], None]]:
    """HELM reads its own YAML files anew in every run, which takes longer than our runs; once is enough."""
    once = functools.cache(launch.register_builtin_configs_from_helm_package)
    with pytest.MonkeyPatch.context() as patch:
        for module in (launch, run):
            patch.setattr(module, "register_builtin_configs_from_helm_package", once)
        yield once


@pytest.fixture(autouse=True, scope="session")
def _few_questions() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SRNScenario, "__init__", begin_with_few)
        yield


@pytest.fixture
def helm_run(helm_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Run `helm-run` with its own command line; returns the directory of the suite's runs."""
    monkeypatch.chdir(tmp_path)

    def helm_run(*arguments: str, suite: str = "suite", local_path: Path = tmp_path / "prod_env") -> Path:
        common = ["--suite", suite, "--local-path", str(local_path), "-o", str(helm_data)]
        run.helm_run(run.build_parser().parse_args([*arguments, *common]))
        return helm_data / "runs" / suite

    return helm_run
