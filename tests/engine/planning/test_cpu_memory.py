"""Protects: a run on the CPU keeps within cpu-memory, whatever its jobs ask for: what does not fit is made smaller."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from models import save_model

_RUN = """
import json, random, sys, threading, time
from engine import Engine, Job, Policy
from engine.job import Sampling
from engine.planning.host_limits import own_memory

model, scored, temperature, count = sys.argv[1], sys.argv[2] == "scored", float(sys.argv[3]), int(sys.argv[4])
length, most = int(sys.argv[5]), int(sys.argv[6])
peak, done = [0], threading.Event()

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], own_memory())

random = random.Random(0)
jobs = [
    Job(
        prompt=[random.randrange(3, 60000) for _ in range(length)],
        max_new_tokens=most,
        prompt_logprobs=scored,
        sampling=Sampling(temperature=temperature),
    )
    for _ in range(count)
]
limit = own_memory() + own_memory()
threading.Thread(target=watch, daemon=True).start()
with Engine.from_pretrained(model, Policy(device="cpu", cpu_memory=limit)) as engine:
    errors = [str(completion.error) for completion in engine.run(jobs) if completion.error]
done.set()
print(json.dumps([limit, peak[0], errors]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide where memory goes: many logits a row, and many keys and values."""
    return save_model(
        tmp_path_factory.mktemp("model"), "llama", vocab_size=60000, head_dim=256, num_hidden_layers=4,
        num_key_value_heads=4, max_position_embeddings=1 << 14,
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "temperature", "count"), [("scored", 0.0, 4), ("plain", 1.0, 40)])
def test_a_run_on_the_cpu_keeps_within_its_limit(model: Path, kind: str, temperature: float, count: int) -> None:
    """Scored: logits of all rows take 0.3 GB, each time they are held. Sampled: so do all jobs' keys and values."""
    check(model, kind, temperature, count, 300)


@pytest.mark.slow
def test_a_long_prompt_on_the_cpu_keeps_within_its_limit(tmp_path: Path) -> None:
    """At once, its rows would take 3 GB in the only layer."""
    model = save_model(
        tmp_path, "llama", vocab_size=60000, intermediate_size=1 << 15, num_hidden_layers=1,
        max_position_embeddings=1 << 14,
    )  # fmt: skip
    check(model, "plain", 0.0, 1, 8000)


@pytest.mark.slow
def test_a_long_prompt_that_is_only_scored_keeps_within_its_limit(model: Path) -> None:
    """The KV cache has no room for its pieces, which need none."""
    check(model, "scored", 0.0, 1, 8000, most=1)


def check(model: Path, kind: str, temperature: float, count: int, length: int, most: int = 2) -> None:
    command = [sys.executable, "-c", _RUN, str(model), kind, *map(str, (temperature, count, length, most))]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    limit, peak, errors = json.loads(made.stdout)
    assert errors == []
    assert peak <= limit
