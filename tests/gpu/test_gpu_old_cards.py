"""On a CUDA device that plays a T4 (no FlashAttention, no bfloat16) the engine gives what plain transformers gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import Engine, Job
from engine.memory import accelerator
from engine.model.attention import flash

pytestmark = pytest.mark.gpu

PROMPTS = [[*range(5, 5 + shared), *range(100 + n, 105 + n)] for shared in (0, 24) for n in range(3)]


@pytest.fixture(autouse=True)
def t4(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What tells a T4 from newer cards, as the engine asks for it."""
    monkeypatch.setattr(flash, "has_flash_attention", lambda device: False)
    monkeypatch.setattr(accelerator, "computes_bfloat16", lambda device: False)
    flash.has_kernels.cache_clear()
    yield
    flash.has_kernels.cache_clear()


@pytest.mark.parametrize("percent", [[100, 0, 100, 0, 100, 0], [20, 80, 0, 100, 0, 100]])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen2"])
def test_float16_is_near_transformers(family: str, percent: list[int], tmp_path: Path) -> None:
    path = models.save_model(tmp_path, family)
    reference: Any = models.load_reference(path).half().cuda()
    policy = {"device": "cuda", "gpu-memory": "2GiB", "dtype": "float16", "percent": percent}
    with Engine.from_pretrained(str(path), policy=policy) as engine:
        done = engine.run([Job(prompt=prompt, max_new_tokens=6, prompt_logprobs=True) for prompt in PROMPTS])
    for prompt, completion in zip(PROMPTS, done, strict=True):
        tokens = [*prompt, *completion.tokens]
        with torch.no_grad():
            logprobs = reference(torch.tensor([tokens], device="cuda")).logits[0].float().log_softmax(-1).cpu()
        assert completion.prompt_logprobs is not None
        found = [*completion.prompt_logprobs[1:], *completion.logprobs]
        expected = [logprobs[at, token].item() for at, token in enumerate(tokens[1:])]
        assert found == pytest.approx(expected, abs=2e-2)


@pytest.mark.parametrize("scale", [9e4, 1e6])
def test_scores_beyond_the_range_of_float16_fail_no_job(scale: float, tmp_path: Path) -> None:
    """Biases as large as Qwen2's: products of queries and keys reach `scale`."""
    path = models.save_model(tmp_path, "qwen2")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:  # one number of a head on either side
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj):
                projection.bias.view(-1, attention.head_dim)[:, -1] = scale**0.5
    model.save_pretrained(path)
    with pytest.warns(UserWarning, match="has no bfloat16: using float16"):
        engine = Engine.from_pretrained(str(path), policy={"device": "cuda", "gpu-memory": "2GiB"})
    with engine:
        done = engine.run([Job(prompt=prompt, max_new_tokens=4, prompt_logprobs=True) for prompt in PROMPTS])
    assert [completion.error for completion in done] == [None] * len(PROMPTS)
