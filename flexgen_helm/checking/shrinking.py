"""Shrinks a model's configuration to a test of seconds: sizes become small, everything else stays switched on."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from engine.checkpoint.model_class import whole_of_half
from engine.errors import ConfigError, named
from flexgen_helm.checking.undecided import UndecidedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

VOCABULARY = 500
WINDOW = 128
"""Positions of a copy."""
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEAD_KEYS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_KEY_HEAD_KEYS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads")
_WIDTH_KEYS = ("hidden_size", "d_model", "n_embd", "embedding_size")
_SMALLER: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), WINDOW),
    "original_max_position_embeddings": 32,
    **dict.fromkeys((*_WIDTH_KEYS, "out_hidden_size"), 64),
    **dict.fromkeys(_HEAD_KEYS, 4),
    **dict.fromkeys(
        (
            *("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "dff", "intermediate_size_mlp", "dim_ff"),
            *("encoder_ffn_dim", "decoder_ffn_dim", "dense_intermediate_size", "expert_ffn_hidden_size"),
        ),
        128,
    ),
    "head_dim": 16,
    "rotary_dim": 8,
    **dict.fromkeys(("sliding_window", "window_size", "attention_chunk_size", "sliding_window_size"), 8),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("swa_head_dim", "dim_head", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    "qk_head_dim": 16,
    "v_head_dim": 12,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_k", "top_k_experts", "moe_topk"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace"), 1),
    "n_group": 2,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("index_topk", "index_block_size"), 8),
    **{"index_topk_blocks": 2, "index_kpool": 4},
    # With few heads many keys have a score of nought, of which some are chosen one way or the other.
    **dict.fromkeys(("index_head_dim", "index_n_heads"), 16),
}
"""The largest value that a setting of this name keeps, in any family."""
SPECIAL = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
_DROPPED = ("quantization_config", "auto_map", "dtype", "torch_dtype", "_name_or_path", "architectures")
_FEW_LAYERS = 3
_MOST_KINDS = 4
"""A list with more different values than this, one for each layer, holds no kinds of layers."""


def shrink(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a real model (nested ones too) with sizes for a test of seconds."""
    heads = _first_number(config, _HEAD_KEYS)
    layers, few = _first_number(config, LAYER_KEYS), layers_needed(config)
    small: dict[str, Any] = {}
    for key, value in config.items():
        if key in _DROPPED:
            continue
        if key in SPECIAL:
            value = SPECIAL[key]
        elif key == "per_layer_config" and isinstance(value, dict):
            value = {layer: shrink(changes) for layer, changes in value.items() if int(layer) < few}
        elif isinstance(value, dict):
            value = shrink(value)
        elif key in LAYER_KEYS and isinstance(value, int):
            value = min(value, few)
        elif key in _KEY_HEAD_KEYS and isinstance(value, int):
            value = 4 if value == heads else min(value, 2)
        elif key in ("short_factor", "long_factor"):  # one number for each pair of rotated elements of a head
            value = [*value, *[1.0] * 8][:8]
        elif key == "mrope_section":  # pairs of rotated elements that turn with time, height and width, of heads of 128
            borders = [round(sum(value[:count]) / 8) for count in range(len(value) + 1)]
            value = [end - first for first, end in pairwise(borders)]
        elif isinstance(value, list) and layers is not None and len(value) == layers:
            value = [_smaller(key, each) for each in value[:few]]
        else:
            value = _smaller(key, value)
        small[key] = value
    if "qk_rope_head_dim" in small and "head_dim" in small:  # DeepSeek's: the part of a head that is rotated
        is_whole = config["head_dim"] == config["qk_rope_head_dim"] + (config.get("qk_nope_head_dim") or 0)
        small["head_dim"] = small["qk_rope_head_dim"] + (small["qk_nope_head_dim"] if is_whole else 0)
    if "word_embed_proj_dim" in small:  # OPT's: narrower than the hidden states only where it was
        small["word_embed_proj_dim"] = 64 if config["word_embed_proj_dim"] == config.get("hidden_size") else 32
    return small


def _smaller(key: str, value: Any) -> Any:
    return min(value, _SMALLER[key]) if type(value) is int and key in _SMALLER else value


def _first_number(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)


def kinds_of_layers(config: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The settings that name a kind for each layer, such as layer_types: lists of a few different values."""
    layers = _first_number(config, LAYER_KEYS)
    found = {}
    for key, value in config.items():
        if isinstance(value, list) and layers is not None and len(value) == layers:
            kinds = [each if isinstance(each, str | int | float | bool | None) else repr(each) for each in value]
            if len({*kinds}) <= _MOST_KINDS:
                found[key] = kinds
    return found


def layers_needed(config: Mapping[str, Any]) -> int:
    """The number of first layers that include every kind of layer, at least three."""
    firsts = (kinds.index(kind) + 1 for kinds in kinds_of_layers(config).values() for kind in kinds)
    return max([_FEW_LAYERS, *firsts])


def config_from(given: Mapping[str, Any], changes: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of a config.json's fields with some of them changed, as its family's class completes it.

    Raises `ConfigError` for changes with which there is no such model.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = given["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(f"{model_type!r} is no model type that this transformers version knows")
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict({**given, **changes})
        config.get_text_config()
    except Exception as error:  # whatever a config class finds wrong
        told = f" with {', '.join(changes)} as given" if changes else ""
        raise ConfigError(f"transformers cannot make a {model_type} config{told}: {named(error)}") from None
    return config


def small_config(full: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """`full` with small sizes and with `changes` as they are; `UndecidedError` where its family refuses such sizes."""
    try:
        small: PreTrainedConfig = type(full).from_dict({**shrink(full.to_dict()), **SPECIAL, **changes})
    except Exception as error:  # whatever a config class finds wrong with the sizes
        raise UndecidedError(_unfit(full, "cannot be shrunk", error)) from None
    return small


def with_small_encoders(half: PreTrainedConfig) -> PreTrainedConfig:
    """The whole model's config for a small text half that only the whole's class runs; any other config unchanged.

    Raises `UndecidedError` where its family refuses such sizes.
    """
    try:
        whole = whole_of_half(half)
        if whole is None:
            return half
        small: PreTrainedConfig = type(whole).from_dict({**shrink(whole.to_dict()), "text_config": half.to_dict()})
    except Exception as error:  # whatever a config class finds wrong with the sizes
        raise UndecidedError(_unfit(half, "cannot be shrunk", error)) from None
    return small


def _unfit(config: PreTrainedConfig, what: str, error: Exception) -> str:
    return f"{config.model_type} {what}: {named(error)}; set what does not fit as KEY=VALUE"
