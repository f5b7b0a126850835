"""Weights of tiny checkpoints in the formats that experts come in, each matrix by itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import quantized
import torch
from safetensors.torch import load_file, save_file

Pack = Callable[[torch.Tensor], dict[str, torch.Tensor]]
"""From a matrix to the tensors that a format has of it."""
EXPERTS = r"experts\.\d+\.\w+\.weight$"
MATRICES = r"(experts\.\d+\.\w+|self_attn\.\w+)\.weight$"
"""Experts and what attention computes with, in the families of the tests."""
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
BLOCKS = {**FP8, "weight_block_size": [8, 16]}
INT4 = {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True}
FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
NVFP4 = {**FLOAT4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}


def save_packed(
    directory: Path, family: str, pack: Pack, told: dict[str, Any] | None, *, which: str = MATRICES, **changes: Any
) -> Path:
    """A model of `family` whose matrices that are called `which` are packed, and its config tells so, if it is to."""
    models.save_model(directory, family, **changes)
    state: dict[str, torch.Tensor] = {}
    for name, values in load_file(directory / "model.safetensors").items():
        if re.search(which, name) and values.ndim == 2:
            base = name.removesuffix(".weight")
            state |= {f"{base}.{part}": each.contiguous() for part, each in pack(values.float()).items()}
        else:
            state[name] = values
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    if told is not None:
        quantized.edit_config(directory, quantization_config=told)
    return directory


def float8_blocks(rows: int, columns: int, scale_type: torch.dtype = torch.float32) -> Pack:
    """DeepSeek's float8 in blocks."""

    def pack(values: torch.Tensor) -> dict[str, torch.Tensor]:
        grid = -(-values.shape[0] // rows), -(-values.shape[1] // columns)
        padded = torch.zeros(grid[0] * rows, grid[1] * columns)
        padded[: values.shape[0], : values.shape[1]] = values
        blocks = padded.view(grid[0], rows, grid[1], columns)
        scales = (blocks.abs().amax((1, 3)) / 448).to(scale_type)
        codes = (blocks / scales.float()[:, None, :, None]).reshape(padded.shape)
        return {
            "weight": codes[: values.shape[0], : values.shape[1]].to(torch.float8_e4m3fn),
            "weight_scale_inv": scales,
        }

    return pack


def float8_whole(scale: str) -> Pack:
    """Float8 with one scale, called `scale`, of the matrix."""

    def pack(values: torch.Tensor) -> dict[str, torch.Tensor]:
        factor = values.abs().max() / 448
        return {"weight": (values / factor).to(torch.float8_e4m3fn), scale: factor}

    return pack


def float8_rows(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Float8 with a scale for each row."""
    factors = values.abs().amax(1, keepdim=True) / 448
    return {"weight": (values / factors).to(torch.float8_e4m3fn), "weight_scale": factors}


def four_bits(values: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest E2M1 numbers, two in a byte, the first in the low half."""
    codes = (values.abs()[..., None] - E2M1).abs().argmin(-1) + 8 * (values < 0)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def modelopt_fours(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """ModelOpt's NVFP4."""
    groups = values.unflatten(1, (-1, 16))
    whole = values.abs().max() / (6 * 448)
    scales = (groups.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
    codes = four_bits((groups / (scales.float() * whole)[..., None]).flatten(1))
    return {"weight": codes, "weight_scale": scales, "weight_scale_2": whole, "input_scale": torch.tensor(0.1)}


def modelopt_numbers(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """What ModelOpt's NVFP4 stands for, code by code."""
    parts = modelopt_fours(values)
    codes = torch.stack([parts["weight"] & 15, parts["weight"] >> 4], -1).flatten(1).tolist()
    table = [*E2M1.tolist(), *(-E2M1).tolist()]
    numbers = torch.tensor([[table[code] for code in row] for row in codes])
    scales = (parts["weight_scale"].float() * parts["weight_scale_2"]).repeat_interleave(16, 1)
    return {"weight": numbers * scales}


def float8_numbers(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What float8 and its scales stand for."""
    return {"weight": parts["weight"].float() * parts["weight_scale"]}


def words(method: str) -> tuple[Pack, Pack]:
    """GPTQ's or AWQ's packing, and what it stands for."""
    return (
        lambda values: quantized.grouped(values, method)[0],
        lambda values: {"weight": quantized.grouped(values, method)[1]},
    )


def save_mxfp4(directory: Path, **changes: Any) -> Path:
    """gpt-oss as it is published: experts in blocks of 32 numbers with an exponent each."""
    models.save_model(directory, "gpt-oss", **changes)
    state = load_file(directory / "model.safetensors")
    for name in [name for name in state if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        groups = state.pop(name).float().transpose(1, 2).unflatten(-1, (-1, 32))
        exponents = (groups.abs().amax(-1) / 6).log2().ceil()
        state[f"{name}_blocks"] = four_bits(groups / exponents.exp2()[..., None])
        state[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    quantized.edit_config(directory, quantization_config={"quant_method": "mxfp4"})
    return directory


def compressed(
    layout: str, scale_type: torch.dtype = torch.float32, **weights: Any
) -> tuple[Pack, dict[str, Any], Callable[[dict[str, torch.Tensor]], torch.Tensor]]:
    """compressed-tensors' own compressor of a layout, what a config tells of it, and its own decompressor."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        format=layout,
    )
    args, compressor = scheme.weights, BaseCompressor.get_value_from_registry(layout)

    def pack(values: torch.Tensor) -> dict[str, torch.Tensor]:
        whole = generate_gparam(values.min(), values.max()) if args.strategy == "tensor_group" else None
        grouped, dims = values, -1
        if args.strategy == "tensor":
            grouped = values.reshape(1, -1)
        elif args.strategy == "block":
            height, width = args.block_structure
            grouped, dims = values.unflatten(1, (-1, width)).unflatten(0, (-1, height)), (1, 3)
        elif args.group_size:
            grouped = values.unflatten(1, (-1, args.group_size))
        scale, zero = calculate_qparams(grouped.amin(dims), grouped.amax(dims), args, global_scale=whole)
        scale, zero = (each.view(-1, 1) if args.strategy == "channel" else each for each in (scale, zero))
        scale = scale.to(scale_type)
        state = {"weight": values, "weight_scale": scale}
        if not args.symmetric:
            state["weight_zero_point"] = zero
        if whole is not None:
            state["weight_global_scale"] = whole.float()
        return dict(compressor.compress(state, scheme))

    def unpack(parts: dict[str, torch.Tensor]) -> torch.Tensor:
        numbers: torch.Tensor = compressor.decompress(parts, scheme)["weight"]
        return numbers

    told = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": scheme.model_dump(mode="json", exclude={"format"})},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }
    return pack, told, unpack
