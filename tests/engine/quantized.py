"""Tiny checkpoints that come quantized: by compressed-tensors' own writer, and in the layouts of GPTQ and AWQ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

TOKEN: dict[str, Any] = {"num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}
"""Inputs in 8 bits, as most W8A8 checkpoints have them."""


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def layers_of(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the decoder."""
    return {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) and "layers." in name}


def save_compressed(
    directory: Path,
    family: str,
    weights: dict[str, Any],
    layout: str,
    *,
    inputs: dict[str, Any] | None = None,
    ignore: tuple[str, ...] = ("lm_head",),
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Quantize all linear layers by the nearest numbers, and save them as compressed-tensors does."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    models.save_model(directory, family)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=None if inputs is None else QuantizationArgs(**inputs),
    )
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=list(ignore), format=layout)
    )
    for module in model.modules():
        args = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if args is None:
            continue
        values = module.weight.data.float()
        if args.strategy == "tensor":
            values = values.reshape(1, -1)
        elif args.strategy == "group":
            values = values.unflatten(1, (-1, args.group_size))
        elif args.strategy == "block":
            rows, columns = args.block_structure
            values = values.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)
        scale, zero = calculate_qparams(values.amin(-1), values.amax(-1), args)
        module.weight_scale.data.copy_(scale.view(module.weight_scale.shape))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero.view(module.weight_zero_point.shape))
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(0.03)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)
    return directory


def dense(directory: Path) -> PreTrainedModel:
    """The unquantized model with the numbers that compressed-tensors makes of its checkpoint, in float32."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    told = json.loads((directory / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme(**told["config_groups"]["group_0"])
    decompressor = BaseCompressor.get_value_from_registry(told["format"])
    state = load_file(directory / "model.safetensors")
    for name in [name for name in state if name.endswith(".weight_scale")]:
        base = name.removesuffix(".weight_scale")
        parts = {each.removeprefix(f"{base}."): state.pop(each) for each in [*state] if each.startswith(f"{base}.")}
        parts["weight_scale"] = parts["weight_scale"].float()
        state[f"{base}.weight"] = decompressor.decompress(parts, scheme)["weight"]
    return from_state(directory, state)


def from_state(directory: Path, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The plain model of a directory's config, without what it says of quantization, with these weights."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    model.tie_weights()
    return model.eval()


def packed_words(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers `[rows, columns]` -> int32 `[rows, words]`, low bits first, one by one."""
    per_word = 32 // bits
    words = torch.zeros(numbers.shape[0], numbers.shape[1] // per_word, dtype=torch.int64)
    for column in range(numbers.shape[1]):
        words[:, column // per_word] += numbers[:, column].long() << (bits * (column % per_word))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def grouped(
    values: torch.Tensor, method: str, bits: int = 4, group: int = 32, order: torch.Tensor | None = None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A matrix in GPTQ's or AWQ's layout, and the numbers that it stands for; `order`: of the inputs' groups."""
    groups = torch.arange(values.shape[1]) // group
    if order is not None:
        groups = groups[order]
    least = torch.stack([values[:, groups == each].amin(1) for each in groups.unique()])
    greatest = torch.stack([values[:, groups == each].amax(1) for each in groups.unique()])
    scales = ((greatest - least) / (2**bits - 1)).half()
    zeros = (-least / scales).round().clamp(1, 2**bits - 1)
    codes = (values.t() / scales[groups] + zeros[groups]).round().clamp(0, 2**bits - 1)
    numbers = (scales[groups] * (codes - zeros[groups]).half()).t().float().contiguous()
    if method == "gptq":
        words, packed_zeros = packed_words(codes.t(), bits).t().contiguous(), packed_words(zeros - 1, bits)
        return {"qweight": words, "qzeros": packed_zeros, "g_idx": groups.to(torch.int32), "scales": scales}, numbers
    columns = [column // 8 * 8 + (0, 2, 4, 6, 1, 3, 5, 7)[column % 8] for column in range(values.shape[0])]
    words, packed_zeros = packed_words(codes[:, columns], 4), packed_words(zeros[:, columns], 4)
    return {"qweight": words, "qzeros": packed_zeros, "scales": scales}, numbers


def save_grouped(directory: Path, method: str, bits: int = 4, *, by_activity: bool = False, group: int = 32) -> Path:
    """A llama in GPTQ's or AWQ's layout, whose numbers `expected` in the directory holds besides."""
    models.save_model(directory, "llama")
    state = load_file(directory / "model.safetensors")
    expected = dict(state)
    random = torch.Generator().manual_seed(1)
    for name in layers_of(models.load_reference(directory)):
        values = state.pop(f"{name}.weight")
        order = torch.randperm(values.shape[1], generator=random) if by_activity else None
        parts, expected[f"{name}.weight"] = grouped(values, method, bits, group, order)
        state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    save_file(expected, directory / "expected.st")
    told = {"quant_method": method, "bits": bits, "group_size": group, "desc_act": by_activity, "sym": False}
    edit_config(directory, quantization_config=told | ({"version": "gemm"} if method == "awq" else {}))
    return directory
