"""Floats of 8 and 4 bits: quant_method fp8 and fbgemm_fp8, MXFP4 as gpt-oss is published, and ModelOpt's formats."""

from __future__ import annotations

from typing import Any

from engine.checkpoint.quantized.method import Kind, Loads, Method, Told, form_of, strange
from engine.errors import shown
from engine.kernels.packed.fours import ModelOptNvFp4, MxFp4Blocks
from engine.kernels.packed.numbers import InverseScaledNumbers, ModelOptFp8, RowScaledNumbers, ScaledBlocks

_SKIPPED = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
"""Fields that list unquantized modules; they are not needed, since the tensors' dtypes show it."""
_MODELOPT_FIELDS = (
    "quant_method",
    "quant_algo",
    "config_groups",
    "producer",
    "group_size",
    "kv_cache_quant_algo",
    "kv_cache_scheme",
)
_FP8_FIELDS = ("quant_method", "activation_scheme", "weight_block_size", "fmt", "scale_fmt", "expert_dtype")


def _fp8_problem(told: Told) -> str | None:
    known: dict[str, tuple[Any, ...]] = {
        "activation_scheme": (None, "dynamic", "static"),
        "fmt": (None, "e4m3", "float8_e4m3fn"),
        "scale_fmt": (None, "float", "ue8m0"),
        "expert_dtype": (None, "fp8"),
    }
    if wrong := next((key for key, values in known.items() if told.get(key) not in values), None):
        return f"the {wrong} {shown(told[wrong])}"
    block = told.get("weight_block_size")
    if block is not None and not _is_block(block):
        return f"the weight_block_size {shown(block)}"
    return strange(told, (*_FP8_FIELDS, *_SKIPPED, "dequantize"))


def _is_block(block: Any) -> bool:
    is_pair = isinstance(block, list | tuple) and len(block) == 2
    return is_pair and all(type(size) is int and size > 0 for size in block)


def _fp8_kind(told: Told, parts: Loads, is_expert: bool) -> Kind | None:
    if "weight_scale_inv" not in parts and not _is_small(parts):
        return None
    block = told.get("weight_block_size")
    if block is None:
        return Kind.of(InverseScaledNumbers, wide=True)
    return Kind.of(ScaledBlocks, block=(block[0], block[1]))


def _fp8_unrounded(told: Told, has_experts: bool) -> str | None:
    return f"inputs of linear layers and experts, in float8 ({told.get('activation_scheme') or 'dynamic'})"


def _fbgemm_problem(told: Told) -> str | None:
    return strange(told, ("quant_method", "activation_scale_ub", *_SKIPPED))


def _fbgemm_kind(told: Told, parts: Loads, is_expert: bool) -> Kind | None:
    return Kind.of(RowScaledNumbers, wide=True) if "weight_scale" in parts or _is_small(parts) else None


def _fbgemm_unrounded(told: Told, has_experts: bool) -> str | None:
    return "inputs of linear layers and experts, in float8 (dynamic)"


def _mxfp4_problem(told: Told) -> str | None:
    return strange(told, ("quant_method", *_SKIPPED, "dequantize"))


def _mxfp4_kind(told: Told, parts: Loads, is_expert: bool) -> Kind | None:
    return Kind.of(MxFp4Blocks)


def _mxfp4_cut(name: str) -> tuple[str, str] | None:
    """Split gpt-oss's names, which append a suffix to the parameter: `gate_up_proj_blocks`."""
    for part in MxFp4Blocks.names:
        if name.endswith(f"_{part}"):
            return name.removesuffix(f"_{part}"), part
    return None


def _modelopt_problem(told: Told) -> str | None:
    algorithm = told.get("quant_algo")
    if algorithm not in ("FP8", "NVFP4", "W4A16_NVFP4"):
        return f"the quant_algo {shown(algorithm)}"
    if (group := told.get("group_size")) not in ((None, 16) if "NVFP4" in str(algorithm) else (None,)):
        return f"the group_size {shown(group)}"
    if (cache := told.get("kv_cache_quant_algo")) not in (None, "FP8"):
        return f"the kv_cache_quant_algo {shown(cache)}"
    return strange(told, (*_MODELOPT_FIELDS, *_SKIPPED))


def _modelopt_kind(told: Told, parts: Loads, is_expert: bool) -> Kind | None:
    if "weight_scale" not in parts and not _is_small(parts):
        return None
    return Kind.of(ModelOptFp8 if told["quant_algo"] == "FP8" else ModelOptNvFp4)


def _modelopt_unrounded(told: Told, has_experts: bool) -> str | None:
    bits = {"FP8": "float8", "NVFP4": "floats of 4 bits"}.get(told["quant_algo"])
    found = [f"inputs of linear layers and experts, in {bits}"] if bits else []
    if told.get("kv_cache_quant_algo") or told.get("kv_cache_scheme"):
        found.append("keys and values, in float8")
    return " and ".join(found) or None


def _is_small(parts: Loads) -> bool:
    """Whether a module's weight has one byte a number."""
    return "weight" in parts and form_of(parts["weight"]).dtype.itemsize == 1


FP8 = Method(_fp8_problem, _fp8_kind, unrounded=_fp8_unrounded)
FBGEMM_FP8 = Method(_fbgemm_problem, _fbgemm_kind, unrounded=_fbgemm_unrounded)
MXFP4 = Method(_mxfp4_problem, _mxfp4_kind, cut=_mxfp4_cut)
MODELOPT = Method(_modelopt_problem, _modelopt_kind, unrounded=_modelopt_unrounded)
