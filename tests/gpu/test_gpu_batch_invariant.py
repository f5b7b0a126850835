"""On a CUDA device a batch-invariant job has the same bits in any company, in 16 bits, whatever the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import companies
import models
import pytest
import torch

from engine import Engine, Job
from engine.kernels.invariant import known_calls
from engine.kernels.invariant.mode import BatchInvariant
from engine.memory import accelerator
from engine.model.attention import flash

pytestmark = pytest.mark.gpu

POLICIES: dict[str, dict[str, Any]] = {
    "on the device": {},
    "streamed": {"percent": [20, 80, 0, 100, 0, 100]},
    "4 bits": {"compress-weight": 4, "compress-cache": 4, "percent": [20, 80, 50, 50, 100, 0]},
    "attention on the host": {"cpu-cache-compute": True, "percent": [20, 80, 0, 100, 100, 0]},
    "unshared": {"share-prefix": False},
}
WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4}


def _policy(dtype: str, **others: Any) -> dict[str, Any]:
    return {"device": "cuda", "gpu-memory": "4GiB", "dtype": dtype, "batch-invariant": True, **others}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_forty_jobs_have_the_same_bits_in_fifty_companies(dtype: str, tmp_path: Path) -> None:
    path = models.save_model(tmp_path, "llama", max_position_embeddings=512, **WIDE)
    assert companies.num_changed(path, companies.make_jobs(40, 512), _policy(dtype), 50) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_a_policy_does_not_change_that(family: str, policy: str, dtype: str, tmp_path: Path) -> None:
    changes = {"max_position_embeddings": 512, **({} if family == "opt" else WIDE)}
    path = models.save_model(tmp_path, family, **changes)
    assert companies.num_changed(path, companies.make_jobs(15, 512), _policy(dtype, **POLICIES[policy]), 5) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", ["gemma2", "gpt-oss", "deepseek-v3", "qwen3-moe", "mistral"])
def test_other_kinds_of_attention_too(family: str, dtype: str, tmp_path: Path) -> None:
    path = models.save_model(tmp_path, family)
    assert companies.num_changed(path, companies.make_jobs(10, 100), _policy(dtype), 4) == 0


@pytest.mark.parametrize("family", ["opt", "llama", "gemma2", "mixtral"])
def test_what_is_not_looked_at_again_has_the_same_bits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = models.save_model(tmp_path, family, max_position_embeddings=512)
    jobs = [Job(prompt=[*range(5, 25 + n)], max_new_tokens=20) for n in range(7)]
    dispatch, counts, found = BatchInvariant.__torch_dispatch__, [], []

    def counted(self: BatchInvariant, *args: Any) -> Any:
        counts[-1] += 1
        return dispatch(self, *args)

    monkeypatch.setattr(BatchInvariant, "__torch_dispatch__", counted)
    for devices in ({"cuda"}, set()):
        monkeypatch.setattr(known_calls, "DEVICES", frozenset(devices))
        counts.append(0)
        with Engine.from_pretrained(str(path), policy=_policy("float16")) as engine:
            found.append([companies.bits(done) for done in engine.run(jobs)])
    assert found[0] == found[1]
    assert counts[0] < counts[1]


def test_an_old_card_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4 has neither FlashAttention nor Triton's products."""
    monkeypatch.setattr(flash, "has_flash_attention", lambda device: False)
    monkeypatch.setattr(accelerator, "runs_triton", lambda device: False)
    path = models.save_model(tmp_path, "llama", max_position_embeddings=512)
    flash.has_kernels.cache_clear()
    from engine.kernels.invariant import products

    products._compiled_for.cache_clear()
    try:
        assert companies.num_changed(path, companies.make_jobs(10, 512), _policy("float16"), 4) == 0
    finally:
        flash.has_kernels.cache_clear()
        products._compiled_for.cache_clear()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_answers_are_near_those_without(family: str, dtype: str, tmp_path: Path) -> None:
    """The arithmetic is another, the numbers are not: as far from plain transformers in float32 as without."""
    path = models.save_model(tmp_path, family)
    jobs = [Job(prompt=[*range(5, 5 + n)], max_new_tokens=0, prompt_logprobs=True) for n in (3, 40, 90)]
    reference: Any = models.load_reference(path).float().cuda()
    errors = []
    for invariant in (False, True):
        with Engine.from_pretrained(str(path), policy={**_policy(dtype), "batch-invariant": invariant}) as engine:
            done = engine.run(jobs)
        worst = 0.0
        for job, completion in zip(jobs, done, strict=True):
            with torch.no_grad():
                logits = reference(torch.tensor([job.prompt], device="cuda")).logits[0].float()
            logprobs = logits.log_softmax(-1).cpu()
            assert completion.prompt_logprobs is not None
            expected = [logprobs[at, token].item() for at, token in enumerate(job.prompt[1:])]
            pairs = zip(completion.prompt_logprobs[1:], expected, strict=True)
            worst = max(worst, *(abs(found - right) for found, right in pairs if found is not None))
        errors.append(worst)
    assert errors[1] <= 1.5 * errors[0] + 1e-3
