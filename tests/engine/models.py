"""Tiny random models of many families, with a real tokenizer, saved as Hugging Face directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 500
WINDOW = 128

_BASE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCABULARY}
_GQA = {**_BASE, "intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": WINDOW}
_HEAD16 = {**_GQA, "head_dim": 16}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_OPT = {**_BASE, "ffn_dim": 128, "max_position_embeddings": WINDOW}

_GPTJ = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": WINDOW}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", {**_OPT, "word_embed_proj_dim": 64}),
    "opt-post-norm": ("opt", {**_OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "llama": ("llama", _GQA),
    "qwen3": ("qwen3", _HEAD16),
    "mistral": ("mistral", {**_GQA, "sliding_window": 8}),
    "gemma2": ("gemma2", {**_HEAD16, "sliding_window": 8, "attn_logit_softcapping": 2.0}),
    "gpt-neox": ("gpt_neox", {**_BASE, "intermediate_size": 128, "max_position_embeddings": WINDOW}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": WINDOW}),
    "phi3": ("phi3", {**_GQA, "pad_token_id": 0}),
    "mixtral": ("mixtral", {**_GQA, "num_local_experts": 4}),
    "gpt-oss": (  # attention sinks
        "gpt_oss",
        {**_HEAD16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "rope_parameters": _ROPE},
    ),
    "deepseek-v3": (  # keys wider than values; a first layer of another kind
        "deepseek_v3",
        {
            **_GQA,
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
}

OWN_ATTENTION: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": VOCABULARY}),
    "gptj": ("gptj", {**_GPTJ, "rotary_dim": 8}),
    "codegen": ("codegen", {**_GPTJ, "rotary_dim": 8}),
    "falcon-rotary": ("falcon", {**_BASE, "alibi": False, "new_decoder_architecture": False, "multi_query": True}),
    "falcon-alibi": ("falcon", {**_BASE, "alibi": True, "multi_query": False, "parallel_attn": False}),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 3, "vocab_size": VOCABULARY, "max_seq_len": WINDOW}),
}
"""Families that do not use transformers' attention interface."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly `VOCABULARY` tokens, trained on the spot."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [f"{a}{b}{c}" for a in ("pre", "re", "un") for b in ("place", "load", "fill") for c in ("s", "ed", "ing")]
    tokenizer.train_from_iterator([" ".join(words), *(f" {n} {n * 37}" for n in range(400))], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", model_max_length=WINDOW
    )


def save_model(directory: Path, family: str, **changes: Any) -> Path:
    """Write a tiny random model of `family` with its tokenizer to `directory`."""
    model_type, config = (FAMILIES | OWN_ATTENTION)[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2} | config | changes)
    )
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, so that an error shows
            parameter.mul_(3.0) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 1
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def load_reference(directory: Path) -> PreTrainedModel:
    """The same model in plain `transformers`, float32, eager attention."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def reference_logprobs(model: PreTrainedModel, tokens: list[int]) -> list[float]:
    """Natural log of p(tokens[i] | tokens[:i]) for i >= 1, by one plain forward."""
    if len(tokens) == 1:
        return []
    logprobs = model(torch.tensor([tokens[:-1]])).logits[0].float().log_softmax(-1)  # the last one may fill the window
    return [logprobs[i - 1, tokens[i]].item() for i in range(1, len(tokens))]


@torch.no_grad()
def reference_greedy(model: PreTrainedModel, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Greedy tokens of `model.generate`, end-of-text excluded."""
    output = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    tokens = output[0, len(prompt) :].tolist()
    return tokens[:-1] if tokens and tokens[-1] == 2 else tokens
