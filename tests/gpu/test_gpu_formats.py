"""On a CUDA device, checkpoints that come packed give what plain transformers makes of their numbers, in 16 bits.

Wherever the packed bytes lie; and with batch-invariant the same bits in any company.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import companies
import packers
import pytest
import torch
from ggufs import save_gguf
from packers import BLOCKS, INT4
from quantized import edit_config
from transformers import AutoModelForCausalLM

from engine import Engine, Job

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # of the libraries about themselves
DEVICE = "cuda"
POLICIES: dict[str, dict[str, Any]] = {
    "device": {"percent": [100, 0, 100, 0, 100, 0]},
    "20-80": {"percent": [20, 80, 0, 100, 0, 100]},
    "disk": {"percent": [0, 0, 0, 0, 0, 0]},
}
ALL = {"num_experts_per_tok": 4}
"""Every token goes to all experts: there is no near tie of a router, which rounding would decide."""
FORMATS: dict[str, Callable[[Path], Path]] = {
    "mxfp4": lambda path: packers.save_mxfp4(path, **ALL),
    "float8 in blocks": lambda path: packers.save_packed(
        path, "qwen3-moe", packers.float8_blocks(8, 16), BLOCKS, **ALL
    ),
    "int4": lambda path: packers.save_packed(
        path, "deepseek-v3", *packers.compressed("pack-quantized", **INT4)[:2], which=packers.EXPERTS, **ALL
    ),
    "gguf": lambda path: save_gguf(path.with_suffix(".gguf"), "llama", "Q8_0"),
}


@pytest.fixture(scope="module")
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    if request.param == "int4":
        pytest.importorskip("compressed_tensors", reason="it makes the codes")
    return request.param, FORMATS[request.param](tmp_path_factory.mktemp("packed") / "model")


def reference_of(name: str, path: Path, scratch: Path) -> Any:
    """Plain transformers, whose numbers are those of the format's own library, in float16 on the card."""
    if name == "gguf":
        found = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    elif name == "int4":
        pack, _, unpack = packers.compressed("pack-quantized", **INT4)
        packers.save_packed(
            scratch,
            "deepseek-v3",
            lambda values: {"weight": unpack(pack(values)).float()},
            None,
            which=packers.EXPERTS,
            **ALL,
        )
        found = AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float32)
    else:  # plain numbers, also where a card has products in few bits
        shutil.copytree(path, scratch)
        told = json.loads((path / "config.json").read_text())["quantization_config"]
        edit_config(scratch, quantization_config={**told, "dequantize": True})
        found = AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float32)
    return torch.nn.Module.half(found.eval()).to(DEVICE)


@pytest.mark.parametrize("packed", FORMATS, indirect=True, scope="module")
def test_float16_is_near_transformers_under_every_placement(packed: tuple[str, Path], tmp_path: Path) -> None:
    """Log-probabilities of the same tokens within 2e-2, and tokens are the likeliest but for ties within that."""
    name, path = packed
    reference = reference_of(name, path, tmp_path / "plain")
    random_ = random.Random(1)
    shared = [random_.randrange(3, 500) for _ in range(24)]
    prompts = [shared[:start] + [random_.randrange(3, 500) for _ in range(9)] for start in (24, 24, 24, 0, 11)]
    jobs = [Job(prompt=prompt, max_new_tokens=8, prompt_logprobs=True) for prompt in prompts]
    for policy in POLICIES.values():
        settings = {"device": DEVICE, "dtype": "float16", "offload-dir": str(tmp_path), **policy}
        with Engine.from_pretrained(str(path), policy=settings) as engine:
            assert engine.parts.model.packed
            done = engine.run(jobs)
        for job, completion in zip(jobs, done, strict=True):
            tokens = [*job.prompt, *completion.tokens]
            with torch.no_grad():
                logits = reference(torch.tensor([tokens], device=DEVICE)).logits[0].float()
            rows = logits.log_softmax(-1).cpu()
            assert completion.prompt_logprobs is not None
            found = [*completion.prompt_logprobs[1:], *completion.logprobs]
            expected = [rows[index, token].item() for index, token in enumerate(tokens[1:])]
            assert found == pytest.approx(expected, abs=2e-2)
            for token, row in zip(completion.tokens, rows[len(job.prompt) - 1 :], strict=False):
                assert row.max().item() - row[token].item() < 2e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("packed", FORMATS, indirect=True, scope="module")
def test_no_bit_depends_on_company(packed: tuple[str, Path], dtype: str, tmp_path: Path) -> None:
    jobs = companies.make_jobs(12, 100)
    settings = {"device": DEVICE, "dtype": dtype, "batch-invariant": True, "offload-dir": str(tmp_path)}
    for policy in ("20-80", "disk"):
        assert companies.num_changed(packed[1], jobs, {**settings, **POLICIES[policy]}, 4) == 0
