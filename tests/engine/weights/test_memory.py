"""Protects: loading costs no memory beyond the placed weights and about one tensor; closing gives all of it back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import models
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[3]
MB = 1 << 20
SLACK = 12 * MB
"""Python objects, thread stacks, and what the allocator rounds up."""

CHILD = """
import gc, json, sys, threading, time
import torch
from engine import Engine, Job

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def load(directory, policy):
    gc.collect()
    start = peak = anonymous()
    done = threading.Event()
    def sample():
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, anonymous())
    sampler = threading.Thread(target=sample)
    sampler.start()
    engine = Engine.from_pretrained(directory, policy={"device": "cpu", "offload-dir": sys.argv[1], **policy})
    engine.wait_until_loaded()
    done.set()
    sampler.join()
    placed, loaded = engine.placed_bytes(), anonymous()
    completions = engine.run([Job(prompt=list(range(3, 20)), max_new_tokens=2)] * 2)
    engine.close()
    gc.collect()
    return {"start": start, "peak": peak, "loaded": loaded, "closed": anonymous(), "placed": placed,
            "errors": [str(completion.error) for completion in completions if completion.error]}

torch.set_num_threads(1)
small, cases = json.loads(sys.argv[2])
for directory in small:  # imports and caches
    load(directory, {})
print(json.dumps([load(*case) for case in cases]))
"""

POLICIES = {
    "host": {"percent": [0, 100, 100, 0, 100, 0]},
    "device": {"percent": [100, 0, 100, 0, 100, 0]},
    "disk": {"percent": [0, 0, 100, 0, 100, 0]},
}
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3, "num_key_value_heads": 4},
    "mixtral": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2, "num_local_experts": 8},
}


def save_large(directory: Path, family: str) -> int:
    """Write a random float16 checkpoint of about 100 MB in shards; returns the bytes of its largest tensor."""
    model_type, config = models.FAMILIES[family]
    made = AutoConfig.for_model(model_type, **{**config, **SIZES[family], "dtype": "float16"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.save_pretrained(directory, max_shard_size="25MB")
    models.make_tokenizer().save_pretrained(directory)
    shards = list(directory.glob("*.safetensors"))
    assert len(shards) > 3
    assert sum(shard.stat().st_size for shard in shards) > 75 * MB
    sizes = [parameter.nbytes for name, parameter in model.named_parameters() if "experts" not in name]
    return max([*sizes, 0 if family == "llama" else 512 * 1536 * 2])


def to_bin(source: Path, target: Path) -> None:
    """The same shards as `.bin` files."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    names: dict[str, str] = {}
    for number, file in enumerate(sorted(source.glob("*.safetensors"))):
        state = load_file(file)
        torch.save(state, target / f"pytorch_model-{number}.bin")
        names |= dict.fromkeys(state, f"pytorch_model-{number}.bin")
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))


def test_loading_takes_the_placed_weights_and_one_tensor(tmp_path: Path) -> None:
    largest = {family: save_large(tmp_path / family, family) for family in SIZES}
    to_bin(tmp_path / "llama", tmp_path / "bin")
    largest["bin"] = largest["llama"]
    small = [str(models.save_model(tmp_path / f"small-{family}", family)) for family in SIZES]
    cases = [("bin", "host"), *product(SIZES, POLICIES)]
    asked = [small, [(str(tmp_path / family), POLICIES[tier]) for family, tier in cases]]
    found = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "offload"), json.dumps(asked)],
        cwd=ROOT,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # so that what is freed is given back
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    for (family, tier), memory in zip(cases, json.loads(found.stdout), strict=True):
        assert memory["errors"] == []
        assert memory["placed"][tier] > 150 * MB  # converted to float32
        placed = 0 if tier == "disk" else memory["placed"][tier]  # loading touches no slots
        assert memory["peak"] - memory["start"] <= placed + largest[family] + SLACK, (family, tier)
        assert memory["closed"] - memory["start"] <= SLACK, (family, tier)
