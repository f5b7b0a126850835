"""The tensors that represent a model's matrices in a packed checkpoint, by its config.json."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.quantizers_utils import should_convert_module

from engine.errors import UnsupportedError, shown
from engine.kernels.packed.matrix import PartForm

_KNOWN = (("pack-quantized", 4), ("pack-quantized", 8), ("int-quantized", 8), ("float-quantized", 8))
"""Formats of compressed-tensors, and the bits of their numbers."""
_EXPERT = re.compile(r"\.experts\.\d+\.\w+\.weight$")
_MERGED = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")
Told = Mapping[str, Any]
Forms = dict[str, PartForm]
"""The parts of a matrix, by their names in the format."""


@dataclass(frozen=True)
class Layout:
    """The packing of the matrices of one checkpoint."""

    parts: Callable[[torch.Size], Forms]
    """The parts of a matrix of this shape, or of experts `[experts, columns, rows]` where they are merged."""
    is_packed: Callable[[str], bool]
    """Whether the matrix of a module is packed, by the module's name."""
    merged: bool = False
    """Experts are packed as one tensor of each part, and nothing else is."""

    def tensors(self, plain: Mapping[str, torch.Size], linear: frozenset[str]) -> dict[str, Forms]:
        """The parts of each matrix that is packed, by the name of the plain tensor that they stand in place of.

        plain: the tensors of the unpacked checkpoint. linear: the names of linear layers' matrices in decoder layers.
        """
        found = {}
        for name, shape in plain.items():
            is_candidate = _MERGED.search(name) if self.merged else name in linear or _EXPERT.search(name)
            if is_candidate and self.is_packed(name.removesuffix(".weight")):
                found[name] = self.parts(shape)
        return found

    def name_of(self, plain: str, part: str) -> str:
        """What the checkpoint calls a part of the matrix that the unpacked one calls `plain`."""
        return f"{plain}_{part}" if self.merged else f"{plain.removesuffix('.weight')}.{part}"


def layout_of(told: Told, scale_type: torch.dtype = torch.bfloat16) -> Layout:
    """The layout of a quantization_config; `UnsupportedError` for one that random codes cannot be made of.

    scale_type: of compressed-tensors' scales, which is that of the model's other numbers.
    """
    method = told.get("quant_method")
    if method == "mxfp4":
        return Layout(_mxfp4, _is_converted(told, "modules_to_not_convert"), merged=True)
    if method == "fp8" and (block := told.get("weight_block_size")):
        return Layout(lambda shape: _blocks(shape, block), _is_converted(told, "modules_to_not_convert"))
    if method == "compressed-tensors":
        return Layout(_compressed(told, scale_type), _is_not_ignored(told.get("ignore") or []))
    raise UnsupportedError(
        f"random codes are not made of {shown(method)} with these settings: they are of mxfp4, of fp8 in blocks, and "
        "of compressed-tensors' pack-quantized, int-quantized and float-quantized with one config group"
    )


def plain_tensors(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Names and shapes of a model's tensors as its unpacked checkpoint has them; the model may be on `meta`."""
    return {name: each.shape for name, each in revert_weight_conversion(model, model.state_dict()).items()}


def linear_matrices(model: PreTrainedModel) -> frozenset[str]:
    """The names of the matrices of linear layers but for the head."""
    head = model.get_output_embeddings()
    modules = model.named_modules()
    return frozenset(f"{name}.weight" for name, each in modules if isinstance(each, nn.Linear) and each is not head)


def _mxfp4(shape: torch.Size) -> Forms:
    experts, columns, rows = shape
    if columns % 32:
        raise UnsupportedError(f"{columns} columns are no multiple of MXFP4's groups of 32")
    return {
        "blocks": PartForm(torch.uint8, torch.Size((experts, rows, columns // 32, 16))),
        "scales": PartForm(torch.uint8, torch.Size((experts, rows, columns // 32))),
    }


def _blocks(shape: torch.Size, block: tuple[int, int]) -> Forms:
    grid = torch.Size(-(-size // each) for size, each in zip(shape, block, strict=True))
    return {"weight": PartForm(torch.float8_e4m3fn, shape), "weight_scale_inv": PartForm(torch.float32, grid)}


def _compressed(told: Told, scale_type: torch.dtype) -> Callable[[torch.Size], Forms]:
    groups = [*(told.get("config_groups") or {}).values()]
    weights = (groups[0].get("weights") or {}) if len(groups) == 1 else {}
    layout, strategy, bits = told.get("format"), weights.get("strategy"), weights.get("num_bits") or 0
    is_known = (
        strategy in ("group", "channel", "tensor")
        and weights.get("symmetric", True)
        and groups[0].get("targets") == ["Linear"]
        and not weights.get("actorder")
        and (layout, bits)
        in (("pack-quantized", 4), ("pack-quantized", 8), ("int-quantized", 8), ("float-quantized", 8))
    )
    if not is_known:
        raise UnsupportedError(
            "random codes of compressed-tensors are of one config group of all linear layers, symmetric, by groups, "
            f"channels or tensors, in 4 or 8 bits; not of {shown(layout)} by {shown(strategy)} in {shown(bits)} bits"
        )

    def parts(shape: torch.Size) -> Forms:
        rows, columns = shape
        size = weights["group_size"] if strategy == "group" else columns
        scales = torch.Size((1,) if strategy == "tensor" else (rows, -(-columns // size)))
        if layout != "pack-quantized":
            dtype = torch.int8 if layout == "int-quantized" else torch.float8_e4m3fn
            return {"weight": PartForm(dtype, shape), "weight_scale": PartForm(scale_type, scales)}
        words = torch.Size((rows, -(-columns * bits // 32)))
        return {
            "weight_packed": PartForm(torch.int32, words),
            "weight_scale": PartForm(scale_type, scales),
            "weight_shape": PartForm(torch.int64, torch.Size((2,))),
        }

    return parts


def _is_converted(told: Told, key: str) -> Callable[[str], bool]:
    patterns = told.get(key)
    return lambda module: bool(should_convert_module(module, patterns))


def _is_not_ignored(ignored: list[str]) -> Callable[[str], bool]:
    """compressed-tensors' rule: names of modules, or regular expressions from their beginning, marked by `re:`."""
    patterns = [name.removeprefix("re:") for name in ignored if name.startswith("re:")]
    names = {name for name in ignored if not name.startswith("re:")}
    return lambda module: module not in names and not any(re.match(pattern, module) for pattern in patterns)
