"""Tiny GGUF files, written by the gguf package as llama.cpp's converter writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import models
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
}


def save_gguf(
    file: Path,
    family: str,
    kind: str,
    *,
    fields: Mapping[str, Any] | None = None,
    more: Mapping[str, torch.Tensor] | None = None,
    pre: str | None = None,
    **changes: Any,
) -> Path:
    """A tiny model whose matrices are of the type `kind`, its embedding of Q8_0; norms and biases are F32.

    fields: further whole numbers and texts of the architecture. more: further tensors. pre: how its tokenizer says that
    it splits texts.
    """
    directory = models.save_model(file.with_suffix(""), family, **changes)
    config = AutoConfig.from_pretrained(directory)
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    _add_config(writer, config)
    for name, value in (fields or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"{gguf.MODEL_ARCH_NAMES[arch]}.{name}", value)
    _add_tokenizer(writer, directory, pre or ("qwen2" if "qwen" in config.model_type else "gpt-2"))
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, values in _stacked(load_file(directory / "model.safetensors")).items():
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, name
        if config.model_type == "llama" and ".self_attn." in name and (".q_proj" in name or ".k_proj" in name):
            heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
            values = values.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        is_matrix = values.ndim > 1 and "gate_inp" not in known
        _add(writer, known, values, ("Q8_0" if "token_embd" in known else kind) if is_matrix else "F32")
    for name, values in (more or {}).items():
        _add(writer, name, values, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: gguf.GGUFWriter, name: str, values: torch.Tensor, kind: str) -> None:
    numbers = values.float().contiguous().numpy()
    type_ = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, numbers if kind == "F32" else gguf.quants.quantize(numbers, type_), raw_dtype=type_)


def _add_config(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type != "qwen2":
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(head)
        writer.add_key_length(head)
    if getattr(config, "num_experts", None):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _add_tokenizer(writer: gguf.GGUFWriter, directory: Path, pre: str) -> None:
    told = json.loads((directory / "tokenizer.json").read_text())["model"]
    tokens = sorted(told["vocab"], key=told["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    special = {"<s>", "<pad>", "</s>"}
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in told["merges"]])
    writer.add_bos_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_eos_token_id(2)


def _stacked(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices of the experts of a layer behind one another, as GGUF files have them."""
    found: dict[str, Any] = {}
    for name, values in state.items():
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            found.setdefault(f"{match[1]}.{match[3]}.weight", {})[int(match[2])] = values
        else:
            found[name] = values
    return {
        name: torch.stack([each[index] for index in sorted(each)]) if isinstance(each, dict) else each
        for name, each in found.items()
    }


def random_blocks(kind: str, rows: int, blocks: int) -> np.ndarray[Any, Any]:
    """uint8 `[rows, blocks * bytes]` of any codes, whose scales are numbers of the usual size."""
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    random = np.random.default_rng(0)
    found = random.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for first in {"Q6_K": [208], "Q4_1": [0, 2]}.get(kind, [0]):
        scales = random.normal(size=(rows, blocks, 1)).astype(np.float16)
        found[..., first : first + 2] = scales.view(np.uint8)
    return found.reshape(rows, -1)
