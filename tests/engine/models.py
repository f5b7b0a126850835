"""Tiny random models of many families, with a real tokenizer, saved as Hugging Face directories."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from flexgen_helm.checking.plain import load_reference, reference_greedy, reference_logprobs
from flexgen_helm.checking.random_model import make_tokenizer, save_random
from flexgen_helm.checking.shrinking import VOCABULARY, WINDOW, small_config

__all__ = [
    "VOCABULARY",
    "WINDOW",
    "config_of",
    "is_known",
    "load_reference",
    "make_tokenizer",
    "reference_greedy",
    "reference_logprobs",
    "save_model",
    "save_random",
    "small_config_of",
]

_BASE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCABULARY}
_FFN = {**_BASE, "intermediate_size": 128, "max_position_embeddings": WINDOW}
_GQA = {**_FFN, "num_key_value_heads": 2}
_HEAD16 = {**_GQA, "head_dim": 16}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_EXTENDED = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_OPT = {**_BASE, "ffn_dim": 128, "max_position_embeddings": WINDOW, "word_embed_proj_dim": 64}
_GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": WINDOW}
_GPTJ = {**_GPT2, "rotary_dim": 8}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", _OPT),
    "opt-post-norm": (
        "opt",
        {**_OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False, "init_std": 0.05},
    ),
    "opt-iml": ("opt", {**_OPT, "bos_token_id": 2, "prefix": "</s>", "_remove_final_layer_norm": False}),
    "galactica": ("opt", {**_OPT, "activation_function": "gelu"}),
    "galactica-bare": (  # no biases, norms without parameters
        "opt",
        {**_OPT, "activation_function": "gelu", "enable_bias": False, "layer_norm_elementwise_affine": False},
    ),
    "llama": ("llama", _GQA),
    "llama-3.1": (
        "llama",
        {
            **_GQA,
            "rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_EXTENDED},
        },
    ),
    "llama-yarn": ("llama", {**_GQA, "rope_parameters": {"rope_type": "yarn", **_EXTENDED}}),
    "qwen2": ("qwen2", _GQA),
    "qwen2-moe": ("qwen2_moe", {**_GQA, **_EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen2-moe-window": (  # the mask alone tells of the windows
        "qwen2_moe",
        {
            **_GQA,
            **_EXPERTS,
            "shared_expert_intermediate_size": 32,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("qwen3", _HEAD16),
    "qwen3-moe": ("qwen3_moe", {**_HEAD16, **_EXPERTS}),
    "mistral": ("mistral", {**_GQA, "sliding_window": 8}),
    "mixtral": ("mixtral", {**_GQA, "num_local_experts": 4}),
    "gemma": ("gemma", _HEAD16),
    "gemma2": ("gemma2", {**_HEAD16, "sliding_window": 8, "attn_logit_softcapping": 2.0}),
    "gemma4": (  # a buffer on every layer, heads of two sizes
        "gemma4_text",
        {
            **_HEAD16,
            **_WINDOWS,
            "hidden_size_per_layer_input": 0,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
        },
    ),
    "gemma4-per-layer-inputs": (  # a second table that is looked up by token ids
        "gemma4_text",
        {
            **_HEAD16,
            **_WINDOWS,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
        },
    ),
    "granite4": (  # a hybrid family with attention alone
        "granitemoehybrid",
        {
            **_GQA,
            "layer_types": ["attention"] * 3,
            "num_local_experts": 0,
            "shared_intermediate_size": 64,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
        },
    ),
    "llama4": (  # attention within chunks; scores scaled by a row's position
        "llama4_text",
        {
            **_HEAD16,
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
            "no_rope_layers": [1, 0, 1],
            "attention_chunk_size": 8,
            "intermediate_size_mlp": 128,
            "num_local_experts": 2,
            "floor_scale": 8,
        },
    ),
    "gemma4-multimodal": (  # the published class; the last layers attend to keys of layers before them
        "gemma4",
        {
            "text_config": {
                **_HEAD16,
                "num_hidden_layers": 6,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"] * 3,
                "num_kv_shared_layers": 2,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": VOCABULARY,
            },
            "vision_config": {**_HEAD16, "num_key_value_heads": 4, "position_embedding_size": 64},
        },
    ),
    "llama4-full": ("llama4_text", {**_HEAD16, "layer_types": ["full_attention"] * 3, "intermediate_size_mlp": 128}),
    "gemma3": ("gemma3_text", {**_HEAD16, **_WINDOWS}),  # rotary tables of two kinds
    "phi": ("phi", _FFN),
    "phi3": ("phi3", {**_GQA, "pad_token_id": 0}),
    "phimoe": ("phimoe", {**_GQA, **_LOCAL_EXPERTS, "sliding_window": 8}),  # the mask alone tells of the windows
    "gpt-neox": ("gpt_neox", _FFN),
    "gpt2": ("gpt2", _GPT2),
    "gpt-bigcode": ("gpt_bigcode", _GPT2),
    "glm": ("glm", _HEAD16),
    "glm4": ("glm4", _HEAD16),
    "olmo": ("olmo", _GQA),
    "olmo2": ("olmo2", _GQA),
    "olmo3": ("olmo3", {**_GQA, **_WINDOWS}),
    "olmoe": ("olmoe", {**_GQA, "num_experts": 4, "num_experts_per_tok": 2}),
    "starcoder2": ("starcoder2", {**_GQA, "sliding_window": 8}),
    "stablelm": ("stablelm", _GQA),
    "granite": (
        "granite",
        {
            **_GQA,
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.5,
            "logits_scaling": 0.5,
        },
    ),
    "granite-moe": ("granitemoe", {**_GQA, **_LOCAL_EXPERTS}),
    "cohere": ("cohere", {**_GQA, "logit_scale": 0.5}),
    "cohere2": ("cohere2", {**_GQA, **_WINDOWS, "logit_scale": 0.5}),
    "persimmon": ("persimmon", _FFN),
    "smollm3": ("smollm3", {**_GQA, "no_rope_layer_interval": 2}),
    "nemotron": ("nemotron", _GQA),
    "ernie4.5": ("ernie4_5", _HEAD16),
    "biogpt": ("biogpt", _FFN),
    "gpt-oss": (  # attention sinks
        "gpt_oss",
        {**_HEAD16, **_LOCAL_EXPERTS, "sliding_window": 8, "rope_parameters": _ROPE},
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
    "glm-moe-dsa": (  # sparse attention; every second layer attends to the keys that the one before it has chosen
        "glm_moe_dsa",
        {
            **_FFN,
            **{"num_key_value_heads": 4, "num_hidden_layers": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
            **{"q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 12, "head_dim": 8},
            **{"index_topk": 8, "index_n_heads": 16, "index_head_dim": 16},
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1},
            **{"indexer_types": ["full", "shared"] * 2, "mlp_layer_types": ["dense", "sparse"] * 2},
        },
    ),
    "lfm2": ("lfm2", {**_GQA, "layer_types": ["conv", "full_attention", "conv"]}),
    "qwen3-next": (  # a state that every token rewrites, experts
        "qwen3_next",
        {
            **_HEAD16,
            **_EXPERTS,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "shared_expert_intermediate_size": 32,
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
            **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
        },
    ),
    "falcon-h1": (  # attention and a state in each layer
        "falcon_h1",
        {
            **_HEAD16,
            "mamba_d_ssm": 128,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
    ),
    "mamba2": (  # no attention; hidden states are float32 in every dtype
        "mamba2",
        {
            **{"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": VOCABULARY, "num_heads": 4, "head_dim": 32},
            **{"n_groups": 1, "state_size": 8, "chunk_size": 16},
        },
    ),
}
"""Families that use transformers' attention interface or keep states: name -> model type and changes of its config."""

OWN_ATTENTION: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": VOCABULARY}),
    "gptj": ("gptj", _GPTJ),
    "codegen": ("codegen", _GPTJ),
    "falcon-rotary": ("falcon", {**_BASE, "alibi": False, "new_decoder_architecture": False, "multi_query": True}),
    "falcon-alibi": ("falcon", {**_BASE, "alibi": True, "multi_query": False, "parallel_attn": False}),
    "falcon-new": ("falcon", {**_BASE, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 3, "vocab_size": VOCABULARY, "max_seq_len": WINDOW}),
    "gpt-neo": (
        "gpt_neo",
        {
            "hidden_size": 64,
            "num_layers": 3,
            "num_heads": 4,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": WINDOW,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 8,
        },
    ),
    "gpt-neox-japanese": (
        "gpt_neox_japanese",
        {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCABULARY},
    ),
    "xglm": (
        "xglm",
        {
            "d_model": 64,
            "num_layers": 3,
            "attention_heads": 4,
            "ffn_dim": 128,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": WINDOW,
        },
    ),
}
"""Families that carry their own attention: they run in padded micro-batches.

GPT-J and CodeGen, whose code is one, do so until transformers 5.23."""

CORE = frozenset({"opt", "opt-post-norm", "llama", "gemma2", "gpt2", "gpt-oss", "deepseek-v3", "bloom"})
"""Those that are run under every policy: the kinds of attention, weights and positions that the others are made of."""


def is_known(family: str) -> bool:
    """Whether the installed transformers has the family's code; newer families come with newer versions."""
    return (FAMILIES | OWN_ATTENTION)[family][0] in CONFIG_MAPPING


def config_of(family: str, **changes: Any) -> PreTrainedConfig:
    """The config of the tiny model of `family`."""
    model_type, config = (FAMILIES | OWN_ATTENTION)[family]
    special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    # A copy: Gemma 4's config changes the list of its layers' kinds.
    return AutoConfig.for_model(model_type, **deepcopy(special | config | changes))


def small_config_of(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The defaults of a model type, shrunk."""
    return small_config(AutoConfig.for_model(model_type), changes)


def save_model(directory: Path, family: str, **changes: Any) -> Path:
    """Write a tiny random model of `family` with its tokenizer to `directory`."""
    return save_random(directory, config_of(family, **changes))
