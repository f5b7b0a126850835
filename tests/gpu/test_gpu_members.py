"""On CUDA devices, engines that share the weights answer as one alone, and each byte in host memory lies there once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import members
import models
import pytest
import torch
from parity import JOBS

from engine import Engine
from engine.memory.tiers import Memory

pytestmark = pytest.mark.gpu

MEMORY = Memory(device=4 << 30, host=16 << 30, disk=1 << 30)
WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6}
POLICIES: dict[str, dict[str, Any]] = {
    "streamed": {"percent": [20, 80, 0, 100, 0, 100]},
    "on the device": {"percent": [100, 0, 100, 0, 100, 0]},
    "three tiers": {"percent": [34, 33, 34, 33, 34, 33]},
    "4 bits": {"percent": [20, 80, 50, 50, 100, 0], "compress-weight": 4},
}


def _numbers(done: list[Any]) -> list[Any]:
    assert [each.error for each in done] == [None] * len(done)
    return [(each.tokens, each.logprobs, each.prompt_logprobs) for each in done]


@pytest.mark.parametrize(
    "gather",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="NCCL wants a card for each process"
            ),
        ),
    ],
)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_two_answer_as_one_alone(family: str, policy: str, gather: bool, tmp_path: Path) -> None:
    path = models.save_model(tmp_path / "model", family, **(WIDE if family == "llama" else {}))
    settings = {"device": "cuda:0", "dtype": "float32", "gpu-memory": "4GiB", "offload-dir": str(tmp_path / "off")}
    settings |= POLICIES[policy]
    with Engine.from_pretrained(str(path), policy=settings) as engine:
        expected, held = _numbers(engine.run(JOBS)), engine.placed_bytes()
    devices = ("cuda:0", "cuda:1") if gather else ("cuda:0", "cuda:0")
    case = members.Case(
        model=str(path), policy=settings, jobs=[JOBS, JOBS], gather=gather, memory=MEMORY, devices=devices
    )
    ((first, second),) = members.run([case], 2, tmp_path)
    assert (first.error, second.error) == (None, None)
    assert _numbers(first.done) == expected
    assert _numbers(second.done) == expected
    assert held["device"] > 0
