"""The compressed-tensors format: its quantization_config, and the formats of its modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from engine.checkpoint.quantized.method import Kind, Loads, Method, Told, form_of, strange
from engine.errors import shown
from engine.kernels.packed.fours import MxFp4, NvFp4
from engine.kernels.packed.matrix import PartForm, type_name
from engine.kernels.packed.numbers import (
    FLOAT8,
    CompressedBlocks,
    ExponentScaledNumbers,
    PackedIntegers,
    ScaledNumbers,
)
from engine.kernels.rounded_inputs import InputRounding

_PLAIN = ("int-quantized", "float-quantized", "naive-quantized")
"""Formats of one byte a number with scales: three names for one layout."""
_LAYOUTS = (*_PLAIN, "pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized")
_FIELDS = (
    "quant_method",
    "format",
    "version",
    "config_groups",
    "ignore",
    "quantization_status",
    "global_compression_ratio",
    "sparsity_config",
)
_GROUP_FIELDS = ("targets", "weights", "input_activations", "output_activations", "format")
_WEIGHT_FIELDS = (
    "num_bits",
    "type",
    "symmetric",
    "group_size",
    "strategy",
    "dynamic",
    "block_structure",
    "actorder",
    "observer",
    "observer_kwargs",
    "scale_dtype",
    "zp_dtype",
)


def _groups(told: Told) -> list[Mapping[str, Any]]:
    return [*(told.get("config_groups") or {}).values()]


def _problem(told: Told) -> str | None:
    groups = told.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        return f"config_groups {shown(groups)}"
    for holder in (told, *groups.values()):
        layout, known = holder.get("format"), (*_LAYOUTS, "mixed-precision") if holder is told else _LAYOUTS
        if layout is not None and layout not in known:
            return f"the format {shown(layout)}"
    for group in groups.values():
        if problem := _group_problem(group, [*groups.values()]):
            return problem
    sparsity = told.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        return "sparse weights"
    return strange(told, _FIELDS)


def _group_problem(group: Mapping[str, Any], groups: list[Mapping[str, Any]]) -> str | None:
    for key in ("weights", "input_activations"):
        if not isinstance(group.get(key) or {}, Mapping):
            return f"{key} {shown(group[key])}"
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    if found := strange(group, _GROUP_FIELDS) or strange(weights, _WEIGHT_FIELDS):
        return found
    if weights.get("dynamic"):
        return "weights that are scaled again at every use"
    if weights.get("strategy") == "block":
        block = weights.get("block_structure")
        if not _is_block(block) or any(_block(each) not in (None, _block(group)) for each in groups):
            return f"the block_structure {shown(block)}"
    # Which layers a group is of is told by patterns, which are not read: inputs of all layers are rounded alike.
    if (
        inputs
        and not _is_left_unrounded(inputs)
        and (InputRounding.of(inputs) is None or any(each.get("input_activations") != inputs for each in groups))
    ):
        kind = "dynamic" if inputs.get("dynamic") else "static"
        return f"inputs in {inputs.get('num_bits')} bits by {inputs.get('strategy')} ({kind})"
    return "outputs in fewer bits" if group.get("output_activations") else None


def _is_block(block: Any) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)


def _block(group: Mapping[str, Any]) -> tuple[int, int] | None:
    weights = group.get("weights") or {}
    block: Any = weights.get("block_structure")
    return (block[0], block[1]) if weights.get("strategy") == "block" and _is_block(block) else None


def _is_left_unrounded(inputs: Mapping[str, Any]) -> bool:
    """Whether inputs are four-bit floats, or float8 with power-of-two scales, as in NVFP4, MXFP4 and MXFP8."""
    if inputs.get("type") != "float" or not inputs.get("symmetric", True):
        return False
    sizes = inputs.get("num_bits"), inputs.get("group_size")
    return sizes in ((4, 16), (4, 32)) or (sizes == (8, 32) and str(inputs.get("scale_dtype")) == "torch.uint8")


def _rounding(told: Told) -> InputRounding | None:
    """How inputs are rounded: alike in all groups, unless there is a `_problem`."""
    groups = _groups(told)
    inputs = groups[0].get("input_activations") if groups else None
    return InputRounding.of(inputs) if inputs and not _is_left_unrounded(inputs) else None


def _unrounded(told: Told, has_experts: bool) -> str | None:
    inputs = [group.get("input_activations") for group in _groups(told)]
    bits = sorted({int(each["num_bits"]) for each in inputs if each and _is_left_unrounded(each)})
    if bits:
        return f"inputs of linear layers, in floats of {' and '.join(map(str, bits))} bits"
    return "inputs of experts, in 8 bits" if has_experts and any(inputs) else None


def _kind(told: Told, loads: Loads, is_expert: bool) -> Kind | None:
    parts = {name: form_of(load) for name, load in loads.items()}
    found = _layout_of(parts)
    if found is None:
        return None
    declared = {group.get("format") for group in _groups(told)} | {told.get("format")}
    declared -= {None, "mixed-precision"}
    if declared and not declared & ({*_PLAIN} if found in _PLAIN else {found}):
        raise ValueError(f"its tensors are {found}, and the format is {shown(sorted(map(str, declared))[0])}")
    if found == "pack-quantized":
        return Kind.of(PackedIntegers, in_scale_type=is_expert)
    if found in _PLAIN:
        block = next(filter(None, map(_block, _groups(told))), None)
        shape = parts["weight"].shape
        is_in_blocks = block is not None and tuple(parts["weight_scale"].shape) == tuple(
            -(-size // each) for size, each in zip(shape, block, strict=True)
        )
        if is_in_blocks and parts["weight"].dtype in FLOAT8:
            return Kind.of(CompressedBlocks, block=block, wide=is_expert)
        return Kind.of(ScaledNumbers, wide=is_expert)
    forms = {"nvfp4-pack-quantized": NvFp4, "mxfp4-pack-quantized": MxFp4, "mxfp8-quantized": ExponentScaledNumbers}
    return Kind.of(forms[found])


def _layout_of(parts: Mapping[str, PartForm]) -> str | None:
    """The layout of a module by the names and dtypes of its tensors; `ValueError` if it is unknown."""
    weight, packed, scale = (parts.get(name) for name in ("weight", "weight_packed", "weight_scale"))
    if packed is None and scale is None and (weight is None or weight.dtype.itemsize > 1):
        return None
    if scale is None:
        raise ValueError("weight_scale is missing")
    if packed is not None:
        if packed.dtype != torch.uint8:
            return "pack-quantized"
        if "weight_global_scale" in parts:
            return "nvfp4-pack-quantized"
        return "mxfp4-pack-quantized"
    if weight is None:
        raise ValueError("weight is missing")
    if weight.dtype == torch.uint8:
        raise ValueError(f"weight is {type_name(weight.dtype)}, neither int8 nor float8")
    return "mxfp8-quantized" if scale.dtype == torch.uint8 else _PLAIN[0 if weight.dtype == torch.int8 else 1]


COMPRESSED_TENSORS = Method(_problem, _kind, _rounding, _unrounded)
