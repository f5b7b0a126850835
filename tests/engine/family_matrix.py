"""Every causal family of `transformers` and its unusual settings: what is built small, and by which sizes."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_FULL = ["full_attention"] * 3
_GEMMA4 = {"num_hidden_layers": 3, "layer_types": _MIXED, "per_layer_config": {}, "vocab_size_per_layer_input": 500}
_ROPES = {
    "rope_parameters": {
        "sliding_attention": _ROPE,
        "full_attention": {**_ROPE, "rope_theta": 100000.0},
    }
}

SIZES: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "bailing_hybrid": {
        **{"num_expert_group": 1, "topk_group": 1, "num_experts": 4, "num_experts_per_token": 2},
        **{"linear_num_heads": 2, "linear_head_dim": 16},
    },
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128, "mamba_chunk_size": 16},
    "kimi_linear": {"num_experts_per_token": 2, "num_experts": 4, "linear_num_heads": 2, "linear_head_dim": 16},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dory": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "gemma3n_text": {
        "num_hidden_layers": 3,
        "layer_types": _MIXED,
        "intermediate_size": [128] * 3,
        "activation_sparsity_pattern": [0.0] * 3,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 500,
        "hidden_size_per_layer_input": 8,
    },
    "gemma4_text": {**_GEMMA4, "hidden_size_per_layer_input": 0},
    "gemma4_unified_text": {**_GEMMA4, "hidden_size_per_layer_input": 0},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1, "state_size": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 16},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 100,
    },
    "reformer": {
        "axial_pos_embds": False,
        "attention_head_size": 16,
        "is_decoder": True,
        "attn_layers": ["local", "lsh", "local"],
    },
    "xlnet": {"d_head": 16},
    "rwkv": {"attention_hidden_size": 64},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        **{"attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4},
        **{"mamba_d_state": 8, "mamba_dt_rank": 8},
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "hybrid", "mamba"],
        "n_mamba_heads": 8,
        **{"mamba_headdim": 16, "hybrid_layer_ids": [1]},
        **{"attention_hidden_size": 128, "attention_head_dim": 32},
        "mamba_d_state": 8,
    },
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "longcat_flash": {"num_layers": 2, "num_hidden_layers": 4},
    "inkling2_text": {"unpadded_vocab_size": 500, "head_dim": 16},
    "marian": {"decoder_vocab_size": 500},
    "roc_bert": {"shape_vocab_size": 20, "pronunciation_vocab_size": 20},
    "xlm": {"emb_dim": 64, "n_layers": 2},
    "xlstm": {"embedding_dim": 64, "num_blocks": 2},
}
SIZES |= {
    name: {**SIZES.get(name, {}), "is_decoder": True}
    for name in (
        *("bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert", "roberta"),
        *("roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
        "bert-generation",
    )
}
SIZES["xmod"]["default_language"] = "en_XX"
"""What shrinking a model type's default config does not know."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2+window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": _MIXED}),
    "qwen3+window": ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": _MIXED}),
    "qwen2_moe+window": ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "layer_types": _MIXED}),
    "qwen3_moe+window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}),
    "phimoe+window": ("phimoe", {"sliding_window": 8}),
    "doge+window": ("doge", {"sliding_window": 8}),
    "doge+moe": ("doge", {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4}),
    "phi3+window": ("phi3", {"sliding_window": 8}),
    "llama+dynamic": ("llama", {"rope_parameters": {**_ROPE, "rope_type": "dynamic", "factor": 2.0}}),
    "llama+linear": ("llama", {"rope_parameters": {**_ROPE, "rope_type": "linear", "factor": 2.0}}),
    "llama+biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "starcoder2+window": ("starcoder2", {"sliding_window": 8}),
    "mistral+no-window": ("mistral", {"sliding_window": None}),
    "mixtral+window": ("mixtral", {"sliding_window": 8}),
    "cwm+mixed": ("cwm", {"sliding_window": 8, "layer_types": _MIXED}),
    "smollm3+nope+window": (
        "smollm3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 8, "layer_types": _MIXED},
    ),
    "laguna+window": ("laguna", {"sliding_window": 8, "layer_types": _MIXED}),
    "granite_swa+mixed": ("granite_swa", {"sliding_window": 8, "layer_types": _MIXED}),
    "granitemoe_swa+mixed": ("granitemoe_swa", {"sliding_window": 8, "layer_types": _MIXED}),
    "granitemoeshared+shared": ("granitemoeshared", {"shared_intermediate_size": 32}),
    "granitemoehybrid+attention-only": (
        "granitemoehybrid",
        {**_MAMBA, "layer_types": ["attention"] * 3, "num_local_experts": 0, "shared_intermediate_size": 64},
    ),
    "lfm2+attention-only": ("lfm2", {"layer_types": _FULL}),
    "lfm3+attention-only": ("lfm3", {"layer_types": _FULL}),
    "minimax+attention-only": ("minimax", {"layer_types": _FULL}),
    "qwen3_next+attention-only": ("qwen3_next", {"layer_types": _FULL}),
    "qwen3_5_text+attention-only": ("qwen3_5_text", {"layer_types": _FULL}),
    "gemma3_text+linear": (
        "gemma3_text",
        {
            "rope_parameters": {
                "sliding_attention": _ROPE,
                "full_attention": {**_ROPE, "rope_type": "linear", "factor": 8.0},
            }
        },
    ),
    "gemma3_text+bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
    "gemma4_text+per-layer-inputs": ("gemma4_text", {**_GEMMA4, "hidden_size_per_layer_input": 8}),
    "gemma4_text+per-layer-inputs+shared-keys": (
        "gemma4_text",
        {
            **_GEMMA4,
            "hidden_size_per_layer_input": 8,
            "num_hidden_layers": 6,
            "layer_types": [*_MIXED[:2], *_MIXED[:2], *_MIXED[:2]],
            "num_kv_shared_layers": 2,
        },
    ),
    "gemma4_text+experts+keys-are-values": (
        "gemma4_text",
        {
            **_GEMMA4,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "attention_k_eq_v": True,
        },
    ),
    "gemma4_text+bidirectional": (
        "gemma4_text",
        {**_GEMMA4, "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "all"},
    ),
    "gemma3n_text+shared-keys+sparse-activations": (
        "gemma3n_text",
        {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2,
            "intermediate_size": [128] * 6,
            "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 4,
        },
    ),
    "minimax_m3_vl_text+sparse": (
        "minimax_m3_vl_text",
        {
            "layer_types": ["minimax_m3_sparse"] * 3,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "index_block_size": 4,
            "index_topk_blocks": 2,
        },
    ),
    "deepseek_v3+groups+yarn": (
        "deepseek_v3",
        {
            "n_group": 2,
            "topk_group": 1,
            "rope_parameters": {
                **_ROPE,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "deepseek_v3+no-q-lora": ("deepseek_v3", {"q_lora_rank": None}),
    "deepseek_v2+no-q-lora": ("deepseek_v2", {"q_lora_rank": None}),
    "deepseek_v2+groups": ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}),
    "glm4_moe+dense-first": ("glm4_moe", {"first_k_dense_replace": 1}),
    "llama4_text+chunks-longer-than-prompts": ("llama4_text", {"attention_chunk_size": 512}),
    "llama4_text+scaled-by-position": (  # by where rows are in a call
        "llama4_text",
        {
            "floor_scale": 4,
            "attn_scale": 0.5,
            "no_rope_layers": [1, 0, 1, 0],
            "layer_types": ["chunked_attention", "full_attention"] * 2,
        },
    ),
    "llama4_text+no-chunks": ("llama4_text", {"layer_types": _FULL}),
    "olmo+clip": ("olmo", {"clip_qkv": 1.0}),
    "olmoe+clip": ("olmoe", {"clip_qkv": 1.0}),
    "stablelm+norms+parallel": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    "persimmon+no-norms": ("persimmon", {"qk_layernorm": False}),
    "phi+norms": ("phi", {"qk_layernorm": True}),
    "gpt_neox+not-parallel": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt2+scaled-by-layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "gpt_bigcode+all-heads": ("gpt_bigcode", {"multi_query": False}),
    "cohere+norms": ("cohere", {"use_qk_norm": True}),
    "mpt+clip+no-alibi": ("mpt", {"attn_config": {"clip_qkv": 1.0, "alibi": False}}),
    "mpt+prefix-lm": ("mpt", {"attn_config": {"prefix_lm": True}}),
    "bloom+post-norm-residual": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "nanochat+cap": ("nanochat", {"final_logit_softcapping": 5.0}),
    "exaone_moe+mixed": ("exaone_moe", {"layer_types": [*_MIXED, "full_attention"], "sliding_window": 8}),
    "exaone4+mixed": ("exaone4", {"layer_types": _MIXED, "sliding_window": 8}),
    "afmoe+dense": ("afmoe", {"num_dense_layers": 2}),
    "mimo_v2_flash+sinks": ("mimo_v2_flash", {"add_full_attention_sink_bias": True}),
    "seed_oss+biases": ("seed_oss", {"attention_bias": True, "attention_out_bias": True}),
    "minicpm3+scales": ("minicpm3", {"scale_emb": 6, "scale_depth": 1.4, "dim_model_base": 32}),
    "dots1+window": ("dots1", {**SIZES["dots1"], "layer_types": _MIXED, "sliding_window": 8}),
    "dory+1-loop": ("dory", {**SIZES["dory"], "n_recurrent_loops": 1}),
    "cohere2_moe+mixed": ("cohere2_moe", {"layer_types": [*_MIXED, "full_attention"], "sliding_window": 8}),
    "gpt_oss+yarn": (
        "gpt_oss",
        {"rope_parameters": {**_ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "ernie4_5_moe+dense-first": ("ernie4_5_moe", {"moe_layer_start_index": 1, "moe_num_shared_experts": 1}),
    "hrm_text+no-prefix": ("hrm_text", {"prefix_lm": False}),
    "glm_moe_dsa+shared-choices": ("glm_moe_dsa", {"indexer_types": ["full", "shared", "full", "shared"]}),
    "zamba2+shared": ("zamba2", {"hybrid_layer_ids": [1, 2], "layer_types": ["mamba", "hybrid", "hybrid"]}),
    "gpt2+encoder-attention": ("gpt2", {"add_cross_attention": True}),
}
"""Settings that defaults leave off: name -> model type and what its config changes."""

_GQA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 500,
    "max_position_embeddings": 128,
}
_TURNS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_HALF_TURNS = {**_TURNS, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_GEMMA4_TEXT = {**_GQA, **_GEMMA4, "sliding_window": 8, "global_head_dim": 32, "num_global_key_value_heads": 1}

MULTIMODAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4:whole+experts": (
        "gemma4",
        {
            "text_config": {
                **_GEMMA4_TEXT,
                "hidden_size_per_layer_input": 0,
                "enable_moe_block": True,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 32,
                "attention_k_eq_v": True,
            }
        },
    ),
    "gemma4:whole+per-layer-inputs+shared-keys": (
        "gemma4",
        {
            "text_config": {
                **_GEMMA4_TEXT,
                "hidden_size_per_layer_input": 8,
                "num_hidden_layers": 6,
                "layer_types": ["sliding_attention", "full_attention"] * 3,
                "num_kv_shared_layers": 2,
            }
        },
    ),
    "mistral3": ("mistral3", {}),
    "mistral4": ("mistral4", {}),
    "llava": ("llava", {}),
    "kimi_k25": ("kimi_k25", {}),
    "qwen2_5_vl": ("qwen2_5_vl", {"text_config": {**_GQA, "rope_parameters": _TURNS}}),
    "qwen3_vl": ("qwen3_vl", {}),
    "qwen3_vl_moe": ("qwen3_vl_moe", {}),
    "glm4v": ("glm4v", {"text_config": {**_GQA, "rope_parameters": _HALF_TURNS}}),
    "glm4v_moe": ("glm4v_moe", {"text_config": {**_GQA, **_EXPERTS, "rope_parameters": _HALF_TURNS}}),
    "llama4:whole": ("llama4", {"architectures": ["Llama4ForConditionalGeneration"]}),
    "mistral_large4": ("mistral_large4", {}),
    "hy_v4_vl": ("hy_v4_vl", {}),
    "minimax_m3_vl": (
        "minimax_m3_vl",
        {
            "text_config": {
                **{**_GQA, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
                "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
                **{"index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4, "index_topk_blocks": 2},
                **{"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2},
            }
        },
    ),
    "qwen2_audio": ("qwen2_audio", {}),
    "voxtral": ("voxtral", {}),
}
"""Multimodal models on text alone: name -> model type and what its config changes."""


_REASONS: dict[str, tuple[str, ...]] = {
    "keep a state that no cache of transformers' holds": ("deepseek_v4", "rwkv"),
    "mix tokens outside their attention": ("doge+moe", "recurrent_gemma"),
    "keeps more than one state": ("inkling2_loop_text", "inkling2_text"),
    "counts positions by places in a call": ("mvp", "roformer", "trocr"),
    "ask their cache for indexer_position_ids": ("qwen4_exp_text",),
    "hand on more than hidden states": ("xlstm",),
    "attention takes position_bias": ("inkling_text",),
    "attend more than once": ("longcat_flash",),
    "attend to later ones": ("bigbird_pegasus", "gemma3_text+bidirectional", "gemma4_text+bidirectional"),
    "changes the hidden states between layers": ("dory", "dory+1-loop", "xlm"),
    "not in one list": ("blt", "hrm_text", "hrm_text+no-prefix"),
    "where .sequences, rows, width. of hidden states is expected": ("reformer",),
    "rows for 1 x 2 tokens": ("cpmant", "prophetnet", "xlnet"),
    "chooses by numbers before it attends": ("jetmoe",),
    "does not hide the padding": ("git",),
    "show no keys and values": ("openai-gpt",),
}
NOT_BUILT = {
    "gemma3n": "needs timm",
    "gemma4_assistant": "drafts for another model, whose keys it takes",
    "gemma4_unified_assistant": "drafts for another model, whose keys it takes",
    "dots3_note": "the same class as dots3_note_text",
    "qwen4_exp": "the same class as qwen4_exp_text",
    "musicgen": "its config has no decoder's fields",
    "musicgen_melody": "its config has no decoder's fields",
}
"""Model types that cannot be built small, and why."""
REFUSED = {name: reason for reason, names in _REASONS.items() for name in names}
"""Why a case is refused, as a pattern; the others are equal."""


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every family and variant by name: its model type, and what shrinking is told."""
    families = {name: (name, SIZES.get(name, {})) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    families |= MULTIMODAL
    for _, changes in VARIANTS.values():
        if "layer_types" in changes:
            changes.setdefault("num_hidden_layers", len(changes["layer_types"]))
    return families | {name: (kind, {**SIZES.get(kind, {}), **changes}) for name, (kind, changes) in VARIANTS.items()}
