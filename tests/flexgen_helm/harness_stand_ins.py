"""A plugin of pytest under which lm-evaluation-harness's own tests of its `hf` model ask our adapter.

Their models and data are the hub's: tiny random models and invented documents stand in for them, and what the harness's
`hf` model answers for those stands in for the answers that are written down for the hub's.
"""

from __future__ import annotations

import json
import os
import random
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from lm_eval import tasks
from lm_eval.models import huggingface

from flexgen_helm.adapters.lm_eval import FlexGenLM

HERE = Path(os.environ["HARNESS_STAND_INS"])
TASKS = {"arc_easy": "multiple_choice", "gsm8k": "generate_until", "wikitext": "loglikelihood_rolling"}
LEFT_OUT = {
    "toc_encode": "token ids of a vocabulary of the hub",
    "toc_decode": "token ids of a vocabulary of the hub",
    "test_batch_encode": "token ids of a vocabulary of the hub",
    "model_generate": "an inner function of the hf model",
    "seq2seq": "encoder-decoders, which the engine does not run",
    "vllm": "another model's function",
}
"""Parts of names of tests that do not apply, and why."""
theirs = huggingface.HFLM
from_pretrained = transformers.AutoTokenizer.from_pretrained


@cache
def directory(name: str) -> Path:
    """A tiny model; that in OLMo's place puts a beginning of text before every text."""
    adds_bos = "OLMo" in name
    return tiny_models.save_tiny_model(HERE / f"bos-{adds_bos}", tiny_models.random_llama, adds_bos=adds_bos)


def documents() -> None:
    """The harness's three tasks, by their names, over invented documents."""
    rng = random.Random(1)
    words = ["What", "is", "the", "capital", "of", "France", "?", "Paris", "def", "random", "(", "x", ")", "return"]
    text = lambda count: " ".join(rng.choice(words) for _ in range(count))  # noqa: E731
    docs = [
        {"question": text(9), "choices": [text(2) for _ in range(4)], "answer": i % 4, "text": text(400)}
        for i in range(12)
    ]
    (HERE / "docs.json").write_text("\n".join(map(json.dumps, docs)))
    data = {"data_files": {"test": str(HERE / "docs.json")}, "cache_dir": str(HERE / "cache")}
    for name, kind in TASKS.items():
        task: dict[str, Any] = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        task |= {"output_type": kind, "doc_to_text": "{{question}}\nAnswer:", "doc_to_target": "{{text}}"}
        if kind == "multiple_choice":
            task |= {"doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
        if kind == "generate_until":
            task["generation_kwargs"] = {"until": ["zzz"]}
        if kind == "loglikelihood_rolling":
            task["doc_to_text"] = ""
        (HERE / f"{name}.yaml").write_text(json.dumps(task))


documents()
tasks.TaskManager = partial(tasks.TaskManager, include_path=str(HERE), include_defaults=False)  # type: ignore[misc]
huggingface.HFLM = lambda pretrained, device, dtype: FlexGenLM(  # type: ignore[misc, assignment]
    str(directory(pretrained)), policy={"device": device}, dtype=dtype
)
transformers.AutoTokenizer.from_pretrained = lambda name, **more: from_pretrained(  # type: ignore[method-assign]
    str(directory(name)) if str(name).startswith(("EleutherAI/", "allenai/")) else name, **more
)


class Bare(FlexGenLM):
    """The adapter's way from texts to tokens, without a model."""

    prefix_token_id = 0

    def __init__(self, tokenizer: Any, add_bos_token: bool | None, backend: str = "causal") -> None:
        self.tokenizer, self.max_length, self.enable_thinking = tokenizer, 4096, None
        self._add_bos_token = add_bos_token

    def tok_batch_encode(self, texts: Any) -> tuple[torch.Tensor, None]:
        """The prompts of texts that are continued."""
        one = [texts] if isinstance(texts, str) else texts
        return torch.tensor([self._encode(text, self.tokenizer.bos_token) for text in one]), None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what does not apply, and put the hf model's answers in the place of those written down."""
    for item in items:
        for part, why in LEFT_OUT.items():
            if part in item.name:
                item.add_marker(pytest.mark.skip(reason=why))
        module: Any = getattr(item, "module", None)
        if hasattr(module, "create_hf_mock"):
            module.create_hf_mock = Bare
        case: Any = getattr(module, "Test_HFLM", None)
        if case is not None and not hasattr(case, "stand_in"):
            case.stand_in = theirs(str(directory("EleutherAI/")), device="cpu", dtype="float32", batch_size=1)
            case.MULTIPLE_CH_RES = [score for score, _ in case.stand_in.loglikelihood(case.MULTIPLE_CH)]
            case.generate_until_RES = case.stand_in.generate_until(case.generate_until)
            case.ROLLING_RES = case.stand_in.loglikelihood_rolling(case.ROLLING)
