"""Protects: the first sweep runs while weights still arrive, and what keeps them from arriving is told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch

from engine import Engine, EngineError, Job
from engine.weights.store import WeightStore

JOB = Job(prompt=[*range(10, 40)], max_new_tokens=3)
POLICIES = {
    "device": {"percent": [100, 0, 100, 0, 100, 0]},
    "thirds": {"percent": [34, 33, 34, 33, 34, 33]},
    "serial": {"percent": [0, 100, 0, 100, 0, 100], "overlap": False},
}
Put = Callable[[str], None]


@pytest.fixture
def before_put(monkeypatch: pytest.MonkeyPatch) -> Callable[[Put], None]:
    """Have something done before each parameter is put in its place, with the parameter's name."""

    def install(act: Put) -> None:
        put = WeightStore.put

        def acting(self: WeightStore, name: str, tensor: torch.Tensor, first_element: int = 0) -> None:
            act(name)
            put(self, name, tensor, first_element)

        monkeypatch.setattr(WeightStore, "put", acting)

    return install


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "gpt-oss", "gpt2"])  # a head of its own, converted experts, a tied head
def test_a_layer_computes_before_the_next_one_has_arrived(
    family: str, policy: str, build: Callable[[str], Path], before_put: Callable[[Put], None], tmp_path: Path
) -> None:
    computed = [threading.Event() for _ in range(3)]
    held: list[str] = []

    def act(name: str) -> None:
        for layer, event in enumerate(computed[:-1], start=1):
            if f".{layer}." in name:
                assert event.wait(20), f"layer {layer - 1} did not compute before {name} arrived"
                held.append(name)

    before_put(act)
    settings: dict[str, Any] = {"device": "cpu", "offload-dir": str(tmp_path), **POLICIES[policy]}
    with Engine.from_pretrained(str(build(family)), policy=settings) as engine:
        for layer, event in zip(engine.parts.model.layers, computed, strict=True):
            layer.register_forward_hook(lambda *_, event=event: event.set())
        (done,) = engine.run([JOB])
        engine.wait_until_loaded()
    assert held
    assert done.error is None
    assert list(done.tokens) == models.reference_greedy(models.load_reference(build(family)), list(JOB.prompt), 3)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_file_that_cannot_be_read_fails_whoever_waits(
    policy: str, build: Callable[[str], Path], before_put: Callable[[Put], None], tmp_path: Path
) -> None:
    def act(name: str) -> None:
        if ".1." in name:
            raise OSError(5, "Input/output error", "model.safetensors")

    before_put(act)
    settings: dict[str, Any] = {"device": "cpu", "offload-dir": str(tmp_path), **POLICIES[policy]}
    with Engine.from_pretrained(str(build("llama")), policy=settings) as engine:
        for wait in (engine.wait_until_loaded, lambda: engine.run([JOB]), lambda: engine.run([JOB])):
            with pytest.raises(EngineError, match="Input/output error") as caught:
                wait()
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_engine_may_be_closed_while_it_loads(
    policy: str, build: Callable[[str], Path], before_put: Callable[[Put], None], tmp_path: Path
) -> None:
    reached, let_go = threading.Event(), threading.Event()

    def act(name: str) -> None:
        if ".1." in name:
            reached.set()
            assert let_go.wait(20)

    before_put(act)
    settings: dict[str, Any] = {"device": "cpu", "offload-dir": str(tmp_path), **POLICIES[policy]}
    engine = Engine.from_pretrained(str(build("llama")), policy=settings)
    stream = engine.stream([JOB])
    assert reached.wait(20)
    closing = threading.Thread(target=engine.close)
    closing.start()
    let_go.set()
    with pytest.raises(EngineError, match="closed"):
        next(stream)
    closing.join(20)
    assert not closing.is_alive()
    with pytest.raises(EngineError, match="closed"):
        engine.run([JOB])
