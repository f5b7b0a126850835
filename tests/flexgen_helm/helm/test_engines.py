"""One engine per model directory and policy in a process: loaded once, when needed, and closed again."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine

from engine import EngineError, Job, Policy
from engine.checkpoint.identity import modelling_source
from engine.checkpoint.identity.modelling_source import source_files
from engine.checkpoint.identity.result import identity_beside_weights, result_identity
from engine.checkpoint.identity.weight_digest import weights_digest
from engine.errors import CapacityError, CheckpointError
from flexgen_helm.helm import engines as engines_module
from flexgen_helm.helm.engines import EngineRegistry


class Loader:
    """Counts what it loads."""

    def __init__(self) -> None:
        self.engines: list[FakeEngine] = []
        self.seconds = 0.0
        self.failure: Exception | None = None
        self.attempts = 0

    def __call__(self, path: str, policy: Policy, window: int | None) -> FakeEngine:
        from transformers import AutoTokenizer

        self.attempts += 1
        time.sleep(self.seconds)
        if self.failure is not None:
            raise self.failure
        self.engines.append(FakeEngine(AutoTokenizer.from_pretrained(path)))
        return self.engines[-1]


@pytest.fixture(autouse=True)
def _closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closes all registries of a test, which hold weight files open."""
    made: list[EngineRegistry] = []
    init = EngineRegistry.__init__

    def recorded(self: EngineRegistry, *args: Any) -> None:
        init(self, *args)
        made.append(self)

    monkeypatch.setattr(EngineRegistry, "__init__", recorded)
    yield
    for registry in made:
        registry.close()


JOBS = [Job(prompt=[20], max_new_tokens=2)]


def test_one_engine_for_all_names_of_a_directory(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny_llama)
    registry = EngineRegistry(Loader())
    served = registry.served(str(tiny_llama), Policy())
    assert registry.served(str(tmp_path / "link"), Policy.load("auto")) is served
    assert registry.served(str(tiny_llama / ".." / tiny_llama.name), Policy()) is served
    assert registry.served(str(tiny_llama), Policy(gpu_batch_size=2)) is not served


def test_threads_that_come_together_load_it_once(tiny_llama: Path) -> None:
    load = Loader()
    load.seconds = 0.2
    registry = EngineRegistry(load)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: list(registry.served(str(tiny_llama), Policy()).stream(JOBS)), range(8)))
    assert len(load.engines) == 1
    assert {done.completion for (done,) in results} == {load.engines[0].answer(JOBS[0])}


def test_describing_and_identifying_a_model_loads_nothing(tiny_llama: Path) -> None:
    load = Loader()
    served = EngineRegistry(load).served(str(tiny_llama), Policy(device="cpu"))
    assert served.description.window == 512
    assert served.identity["dtype"] == "float32"
    assert load.attempts == 0


class Reading(FakeEngine):
    """An engine that is still reading weight files for their digest when it is closed."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.asked, self.over = threading.Event(), threading.Event()
        self.reason: EngineError | None = None

    def weights_digest(self) -> None:
        self.asked.set()
        self.over.wait()
        raise self.reason or EngineError("the engine was closed")

    def close(self) -> None:
        super().close()
        self.over.set()


def test_answers_of_an_engine_that_is_closed_before_its_digest_is_known_have_an_identity(tiny_llama: Path) -> None:
    """Those of the last pass before an early end are kept all the same; a fault of reading stays one."""
    load = Loader()
    registry = EngineRegistry(lambda *args: Reading(load(*args).tokenizer))
    served = registry.served(str(tiny_llama), Policy())
    list(served.stream(JOBS))
    engine = served._engine
    assert isinstance(engine, Reading)
    assert served.known_identity is None
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(lambda: served.identity)
        engine.asked.wait()
        served.close()
        assert found.result() == served.known_identity == result_identity(str(tiny_llama), Policy())
    faulty = registry.served(str(tiny_llama), Policy(gpu_batch_size=2))
    list(faulty.stream(JOBS))
    assert isinstance(faulty._engine, Reading)
    faulty._engine.reason = EngineError("cannot be read")
    faulty._engine.over.set()
    with pytest.raises(EngineError, match="cannot be read"):
        _ = faulty.identity
    assert faulty.known_identity is None


@pytest.mark.parametrize("changed", ["config.json", "tokenizer_config.json", "source", "while it loads"])
def test_a_model_that_was_written_to_is_not_loaded_again_under_its_identity(
    changed: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, package = Path(shutil.copytree(tiny_llama, tmp_path / "model")), tmp_path / "transformers"
    for file in source_files({"model_type": "llama"}).values():
        copied = package / file.relative_to(modelling_source._package())
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copied)
    monkeypatch.setattr(modelling_source, "_package", lambda: package)
    file = package / "models" / "llama" / "modeling_llama.py" if changed == "source" else model / "config.json"
    file = model / changed if changed.endswith(".json") else file

    def write() -> None:
        with file.open("a") as stream:
            stream.write("\n")

    load = Loader()
    registry = EngineRegistry(lambda *args: (write() if changed == "while it loads" else None, load(*args))[1])
    served = registry.served(str(model), Policy())
    before = identity_beside_weights(str(model), Policy())
    if changed != "while it loads":
        list(served.stream(JOBS))
        served.close()
        list(served.stream(JOBS))  # as it was
        served.close()
        write()
    part = "source" if changed == "source" else "files"
    for _ in range(2):
        with pytest.raises(CheckpointError, match="start again") as caught:
            list(served.stream(JOBS))
        after = identity_beside_weights(str(model), Policy())
        told = f"(sha256 {str(before[part])[:12]} then, {str(after[part])[:12]} now)"
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)
    assert len(load.engines) == (1 if changed == "while it loads" else 3)
    assert all(engine.closed for engine in load.engines)


def test_weights_that_are_written_to_after_the_engine_has_read_them_have_no_identity(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """An answer is of what the engine read, not of what is there when the digest is computed."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    served = EngineRegistry(Loader()).served(str(model), Policy())
    list(served.stream(JOBS))
    with (model / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x55")
    with pytest.raises(CheckpointError, match="was written to while the engine reads its weights"):
        _ = served.identity
    assert served.known_identity is None


def test_closing_does_not_wait_for_who_reads_weights_for_an_identity(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def slow(*args: Any) -> str:
        reading.set()
        assert go_on.wait(40)
        return weights_digest(*args)

    monkeypatch.setattr(engines_module, "weights_digest", slow)
    registry = EngineRegistry(Loader())
    served = registry.served(str(tiny_llama), Policy())
    with ThreadPoolExecutor(2) as pool:
        found = pool.submit(lambda: served.identity)
        assert reading.wait(20)
        pool.submit(lambda: (registry.close(), closed.set()))
        was_closed = closed.wait(20)
        go_on.set()
        assert was_closed
        with pytest.raises(EngineError, match="the weight files have been closed"):
            found.result(20)
    assert served.known_identity is None


@pytest.mark.parametrize("failure", [CapacityError("too large"), RuntimeError("two\nlines")])
def test_what_cannot_be_loaded_is_tried_once(tiny_llama: Path, failure: Exception) -> None:
    load = Loader()
    load.failure = failure
    registry = EngineRegistry(load)
    messages = []
    for _ in range(3):
        with pytest.raises(EngineError) as caught:
            list(registry.served(str(tiny_llama), Policy()).stream(JOBS))
        messages.append(str(caught.value))
    assert load.attempts == 1
    assert len(set(messages)) == 1
    assert "\n" not in messages[0]


def test_an_idle_engine_gives_its_memory_to_the_next_one(tiny_llama: Path) -> None:
    load = Loader()
    registry = EngineRegistry(load)
    first, second = (registry.served(str(tiny_llama), Policy(gpu_batch_size=size)) for size in (1, 2))
    list(first.stream(JOBS))
    list(second.stream(JOBS))
    assert [engine.closed for engine in load.engines] == [True, False]
    list(first.stream(JOBS))
    assert [engine.closed for engine in load.engines] == [True, True, False]


def test_an_engine_at_work_is_not_closed(tiny_llama: Path) -> None:
    load = Loader()
    registry = EngineRegistry(load)
    first, second = (registry.served(str(tiny_llama), Policy(gpu_batch_size=size)) for size in (1, 2))
    running = first.stream(JOBS)
    next(running)
    list(second.stream(JOBS))
    assert [engine.closed for engine in load.engines] == [False, False]
    running.close()
    list(registry.served(str(tiny_llama), Policy(gpu_batch_size=3)).stream(JOBS))
    assert [engine.closed for engine in load.engines] == [True, True, False]


@pytest.mark.usefixtures("warm_processes")
def test_engines_are_closed_and_no_thread_is_left_when_the_process_ends(tiny_llama: Path, tmp_path: Path) -> None:
    program = f"""
import sys
sys.path[:0] = {[str(Path(__file__).resolve().parents[at]) for at in (1, 3)]!r}
from engine import Job
from engine.policy import Policy
from fake_engine import FakeEngine
from transformers import AutoTokenizer
from flexgen_helm.helm.engines import engines
class Speaking(FakeEngine):
    def close(self):
        print("closed")
engines.load = lambda path, policy, window: Speaking(AutoTokenizer.from_pretrained(path))
served = engines.served({str(tiny_llama)!r}, Policy(device="cpu"))
print(len(served.batcher.ask([Job(prompt=[20])]).completions))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["1", "closed"], "")


def test_nothing_of_ours_runs_in_the_background_before_a_job(tiny_llama: Path) -> None:
    before = threading.active_count()
    EngineRegistry(Loader()).served(str(tiny_llama), Policy())
    assert threading.active_count() == before
