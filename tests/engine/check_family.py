"""Checks one family against plain transformers: `python tests/engine/check_family.py CONFIG [KEY=VALUE ...]`.

CONFIG is a model directory or its config.json, whose settings are kept but for their sizes, or a model type of
`transformers`, whose defaults are shrunk. KEY=VALUE sets what shrinking does not know, e.g. `head_dim=16`. Exits with 0
when every token and log-probability agrees; 1 when not, when agreement of so tiny a model would say nothing, when
something that the config turns on was not run, or when the engine refuses the family; 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import models
import parity
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from engine import Engine, EngineError

LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEAD_KEYS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
KEY_HEAD_KEYS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads")
WIDTH_KEYS = ("hidden_size", "d_model", "n_embd", "embedding_size")
SMALLER: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), models.VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), models.WINDOW),
    "original_max_position_embeddings": 32,
    **dict.fromkeys(WIDTH_KEYS, 64),
    **dict.fromkeys(HEAD_KEYS, 4),
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
}
"""The most that a setting of this name, in any family, is left at."""
SPECIAL = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
DROPPED = ("quantization_config", "auto_map", "dtype", "torch_dtype", "_name_or_path", "architectures")
MOST_PARAMETERS = 20_000_000
LONGEST = max(len(job.prompt) + job.max_new_tokens for job in parity.JOBS)
"""Tokens of the longest sequence of the check."""


class BadInput(Exception):
    """What was asked for cannot be checked; the message is one line."""


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a real model (nested ones too) with sizes for a test of seconds."""
    layers = next((config[key] for key in LAYER_KEYS if isinstance(config.get(key), int)), None)
    heads = next((config[key] for key in HEAD_KEYS if isinstance(config.get(key), int)), None)
    kinds = next((config[key] for key in ("layer_types", "attention_layers") if config.get(key)), None) or []
    few = max([3, *(kinds.index(kind) + 1 for kind in kinds)])  # layers of every kind
    small: dict[str, Any] = {}
    for key, value in config.items():
        if key in DROPPED:
            continue
        if key in SPECIAL:
            value = SPECIAL[key]
        elif key == "per_layer_config" and isinstance(value, dict):
            value = {layer: shrink(changes) for layer, changes in value.items() if int(layer) < few}
        elif isinstance(value, dict):
            value = shrink(value)
        elif key in LAYER_KEYS and isinstance(value, int):
            value = min(value, few)
        elif key in KEY_HEAD_KEYS and isinstance(value, int):
            value = 4 if value == heads else min(value, 2)
        elif key in ("short_factor", "long_factor"):  # one number for each pair of rotated elements of a head
            value = [*value, *[1.0] * 8][:8]
        elif isinstance(value, list) and layers is not None and len(value) == layers:
            value = value[:few]
        elif isinstance(value, int) and not isinstance(value, bool) and key in SMALLER:
            value = min(value, SMALLER[key])
        small[key] = value
    if "qk_rope_head_dim" in small and "head_dim" in small:  # DeepSeek's: the part of a head that is rotated
        small["head_dim"] = small["qk_rope_head_dim"]
    if "word_embed_proj_dim" in small:  # OPT's: narrower than the hidden states only where it was
        small["word_embed_proj_dim"] = 64 if config["word_embed_proj_dim"] == config.get("hidden_size") else 32
    return small


def full_config(source: str) -> PreTrainedConfig:
    """The config of a directory, a config.json or a model type, as it is."""
    path = Path(source).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        try:
            given = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInput(f"{file} cannot be read: {error}") from None
        model_type = given.get("model_type") if isinstance(given, dict) else None
        where = str(file)
    else:
        given, model_type, where = {}, source, "no such file, and"
    if model_type not in CONFIG_MAPPING:
        raise BadInput(f"{where} {model_type!r} is no model type that this transformers version knows")
    try:
        return CONFIG_MAPPING[model_type].from_dict(given) if given else AutoConfig.for_model(model_type)
    except Exception as error:  # whatever a config class finds wrong
        raise BadInput(f"{model_type}: {_line(error)}") from None


def tiny_config(source: str, changes: dict[str, Any]) -> PreTrainedConfig:
    """The shrunk config of a directory, a config.json or a model type."""
    full = full_config(source)
    try:
        return type(full).from_dict({**shrink(full.to_dict()), **SPECIAL, **changes})
    except Exception as error:  # whatever a config class finds wrong with the sizes
        raise BadInput(f"{full.model_type}: {_line(error)}; set what does not fit as KEY=VALUE") from None


def not_run(full: PreTrainedConfig, tiny: PreTrainedConfig) -> list[str]:
    """What the full config turns on that a model of the tiny one does not do with the jobs of the check."""
    found = []
    kinds, small = ({str(kind) for kind in _text(config).get("layer_types") or ()} for config in (full, tiny))
    found += [f"layers of the kind {kind}" for kind in sorted(kinds - small)]
    try:
        large, little = _module_kinds(full), _module_kinds(tiny)
    except Exception as error:  # at full size something is missing that shrinking gave it
        found.append(f"what a model of full size is made of could not be compared ({_line(error)})")
    else:
        found += [f"modules of the kind {kind}" for kind in sorted(large - little)]
    for key, value in _settings(_text(tiny)):
        is_limit = key.endswith(("window", "window_size", "chunk_size", "original_max_position_embeddings"))
        if is_limit and isinstance(value, int) and value >= LONGEST:
            found.append(f"{key} {value}, which no prompt of the check reaches ({LONGEST} tokens at most)")
    return found


def _text(config: PreTrainedConfig) -> dict[str, Any]:
    settings: dict[str, Any] = config.get_text_config().to_dict()
    return settings


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every setting, nested ones too."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _settings(value)
        else:
            yield str(key), value


def _module_kinds(config: PreTrainedConfig) -> set[str]:
    with torch.device("meta"):
        return {type(module).__name__ for module in AutoModelForCausalLM.from_config(config).modules()}


def build(directory: Path, config: PreTrainedConfig) -> Path:
    """Write a random model of `config` to `directory`, if it is small enough."""
    try:
        with torch.device("meta"):
            sizes = {name: p.numel() for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
        if sum(sizes.values()) > MOST_PARAMETERS:
            largest = max(sizes, key=lambda name: sizes[name])
            raise BadInput(
                f"{config.model_type} still has {sum(sizes.values()):,} parameters, {sizes[largest]:,} of them in "
                f"{largest}; set its sizes as KEY=VALUE"
            )
        return models.save_random(directory, config)
    except BadInput:
        raise
    except Exception as error:  # whatever a model class finds wrong with the sizes
        raise BadInput(
            f"{config.model_type} cannot be built: {_line(error)}; set what does not fit as KEY=VALUE"
        ) from None


def check(config: PreTrainedConfig, folder: Path, unseen: Sequence[str] = ()) -> str:
    """Compare a model of `config` with plain transformers under several policies; print and tell what came out.

    `unseen` is what such a model does not do: it is not exact then, however it agrees.
    """
    directory = build(folder / "model", config)
    reference = models.load_reference(directory)
    try:
        expected, reach = parity.expect(reference), parity.reach(reference)
        contradictions = parity.contradictions(reference, expected)
    except Exception as error:
        raise BadInput(
            f"{config.model_type} does not run in plain transformers at these sizes: {_line(error)}"
        ) from None
    if contradictions:
        raise BadInput(
            f"{config.model_type}: plain transformers contradicts itself, so there is nothing to compare with: for "
            f"{contradictions} of {len(expected)} jobs, generate gives other tokens than the greedy ones of the forward"
        )
    size = f"{reference.num_parameters():,} random parameters"
    print(f"{config.model_type}: {size}; a prompt's first token moves later log-probabilities by up to {reach:.1g}")
    says_something, is_exact = reach > parity.REACH, True
    if not says_something:
        print("  too little: agreement would say nothing")
    for what in unseen:
        print(f"  not run: {what}")
    for policy, padding in parity.SELECTION:
        settings = {"device": "cpu", "pad-to-seq-len": parity.PADDINGS[padding], "offload-dir": str(folder / "offload")}
        with Engine.from_pretrained(str(directory), policy=settings | parity.POLICIES[policy]) as engine:
            done = engine.run(parity.JOBS)
        found, largest = parity.differences(expected, done)
        print(
            f"  {policy:6} {padding:6} {len(found)} of {len(done)} jobs differ; log-probabilities within {largest:.1e}"
        )
        for line in found[:3]:
            print(f"    {line}")
        is_exact &= not found
    return "DIFFERENT" if not is_exact else "EXACT" if says_something and not unseen else "UNDECIDED"


def main(arguments: list[str] | None = None) -> int:
    """Run the check; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("changes", metavar="KEY=VALUE", nargs="*")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            changes = dict(_setting(change) for change in options.changes)
            tiny = tiny_config(options.config, changes)
            verdict = check(tiny, Path(folder), not_run(full_config(options.config), tiny))
        except BadInput as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except EngineError as error:
            print(f"REFUSED: {error}")
            return 1
    print(verdict)
    return 0 if verdict == "EXACT" else 1


def _setting(change: str) -> tuple[str, Any]:
    key, equals, value = change.partition("=")
    if not equals:
        raise BadInput(f"{change!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    raise SystemExit(main())
