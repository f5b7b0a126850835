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
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from engine.checkpoint.gguf.index import PLAIN

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
    of_tokenizer: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A tiny model whose matrices are of the type `kind`, its embedding of Q8_0 or plain too; norms and biases are F32.

    fields: further whole numbers and texts of the architecture, or general ones, or None for one that is left out.
    more: further tensors. pre: how its tokenizer says that it splits texts. of_tokenizer: its further fields, or None
    likewise. Beside the file, in a directory of its name, is the model that it was made of, with the numbers that the
    types can hold.
    """
    directory = models.save_model(file.with_suffix(""), family, **changes)
    fields, of_tokenizer = fields or {}, of_tokenizer or {}
    config = AutoConfig.from_pretrained(directory)
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    _add_config(writer, config)
    for name, value in fields.items():
        is_general = name.startswith("general.")
        _add_field(writer, name if is_general else f"{gguf.MODEL_ARCH_NAMES[arch]}.{name}", value)
    if is_qwen := "qwen" in config.model_type:
        _set_class(directory, "Qwen2Tokenizer")  # as published, whatever the model's family
    _add_tokenizer(writer, directory, pre or ("qwen2" if is_qwen else "gpt-2"))
    for name, value in of_tokenizer.items():
        _add_field(writer, f"tokenizer.ggml.{name}", value)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    state = load_file(directory / "model.safetensors")
    types = {name: _type(name, values, kind) for name, values in state.items()}
    held = {name: _held(values, types[name]) for name, values in state.items()}
    save_file(held, directory / "model.safetensors", {"format": "pt"})
    for name, values in _stacked(state).items():
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, name
        if config.model_type == "llama" and ".self_attn." in name and (".q_proj" in name or ".k_proj" in name):
            heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
            values = values.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        _add(writer, known, values, _type(name, values, kind))
    for name, values in (more or {}).items():
        _add(writer, name, values, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _type(name: str, values: torch.Tensor, kind: str) -> str:
    if values.ndim == 1 or name.endswith(".gate.weight"):
        return "F32"
    return "Q8_0" if "embed_tokens" in name and kind not in PLAIN else kind


def _held(values: torch.Tensor, kind: str) -> torch.Tensor:
    """The numbers that a type can hold, nearest to these by the gguf package."""
    type_ = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values.float().numpy(), type_), type_).copy())


def _add_field(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    """In the place of what was told by this name; None takes that away."""
    writer.kv_data[0].pop(name, None)
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    elif isinstance(value, list):
        writer.add_array(name, value)
    elif value is not None:
        writer.add_uint32(name, value)


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


def _set_class(directory: Path, name: str) -> None:
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": name}))


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


def with_last_token(token: str, kind: gguf.TokenType) -> dict[str, Any]:
    """Fields of the tiny models' tokenizer with another last token."""
    told = json.loads(models.make_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(told["vocab"], key=told["vocab"].get)[:-1]
    return {
        "tokens": [*tokens, token],
        "token_type": [*[gguf.TokenType.CONTROL] * 3, *[gguf.TokenType.NORMAL] * (len(tokens) - 3), kind],
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in told["merges"]][:-1],
    }


SENTENCEPIECE = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a"]


def of_sentencepiece() -> dict[str, Any]:
    """Fields of a tokenizer of `SENTENCEPIECE` and fillers."""
    tokens = [*SENTENCEPIECE, *(f"<filler{index}>" for index in range(models.VOCABULARY - len(SENTENCEPIECE)))]
    kinds = {"<unk>": gguf.TokenType.UNKNOWN, "<s>": gguf.TokenType.CONTROL, "</s>": gguf.TokenType.CONTROL}
    others = {"<0": gguf.TokenType.BYTE, "<f": gguf.TokenType.UNUSED}
    return {
        **{"model": "llama", "pre": None, "merges": None, "tokens": tokens},
        "token_type": [kinds.get(token, others.get(token[:2], gguf.TokenType.NORMAL)) for token in tokens],
        "scores": [-float(index) for index in range(len(tokens))],
        **{"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "padding_token_id": None},
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
