"""Models of real shapes with random weights, for benchmarks: nothing is downloaded, and no zeros flatter the card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, PreTrainedTokenizerFast

from engine import Engine, Policy
from engine.checkpoint import ModelDescription
from engine.weights import WeightStore

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (
        "opt",
        {
            "hidden_size": width,
            "ffn_dim": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "word_embed_proj_dim": width,
            "vocab_size": 50272,
            "max_position_embeddings": 2048,
            "bos_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
    )
    for name, width, layers, heads in (
        ("opt-125m", 768, 12, 12),
        ("opt-1.3b", 2048, 24, 32),
        ("opt-6.7b", 4096, 32, 32),
        ("opt-13b", 5120, 40, 40),
        ("opt-30b", 7168, 48, 56),
    )
}


def open_dummy(shape: str, policy: Policy) -> Engine:
    """An engine over `SHAPES[shape]` with random weights; end-of-text is made impossible, so lengths are as asked."""
    model_type, config = SHAPES[shape]
    folder = Path(tempfile.mkdtemp(prefix="flexgen-dummy-"))
    AutoConfig.for_model(model_type, **config).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": -1}')
    description = ModelDescription(
        path=str(folder),
        model_type=model_type,
        window=config["max_position_embeddings"],
        dtype="float16",
        weight_bytes=0,
        num_layers=config["num_hidden_layers"],
    )
    return Engine.open(description, policy, fill_randomly)


def fill_randomly(store: WeightStore) -> None:
    """Put small random numbers everywhere: one random block, repeated."""
    block = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).half()
    for unit in store.model.units:
        for name in unit.owners:
            size = store.model.state[name].numel()
            for first in range(0, size, len(block)):
                store.put(name, block[: size - first], first_element=first)
    store.finish_loading()
