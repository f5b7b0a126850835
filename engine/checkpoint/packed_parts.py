"""Finds the matrices of a checkpoint that comes quantized, or says why it cannot be run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.checkpoint.tensors import tensors
from engine.errors import UnsupportedError, named, one_line, shown
from engine.kernels.packed_matrix import (
    EightBitRows,
    FourBitBlocks,
    InterleavedRows,
    PackedColumns,
    PackedIntegers,
    PackedMatrix,
    PartForm,
    ScaledNumbers,
)
from engine.kernels.rounded_inputs import InputRounding

Load = Callable[[], torch.Tensor]
Name = Callable[[str], str | None]
"""From a parameter's name in the checkpoint to the model's; None where that is not one to one."""
_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
_CURE = "take the unquantized checkpoint, or one that is {known}"
_LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
"""Of compressed-tensors, as `packed_matrix` reads them."""
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
_SCALES = ("weight_scale", "input_scale", "scales", "SCB")
_WORDS = ("weight_packed", "qweight", "qzeros")
_KNOWN = ("bitsandbytes", "compressed-tensors", "gptq", "awq")


def find_packed(
    path: Path,
    quantization: Mapping[str, Any],
    owners: Mapping[str, nn.Module],
    name_of: Name,
) -> dict[str, PackedMatrix]:
    """The packed matrices of a model directory, by the model's parameter; reads headers, and a few bytes each.

    Where the checkpoint has inputs of their layers rounded, the layers are made to do so.

    quantization: the config's quantization_config. owners: the modules of parameters that may be packed, by parameter.
    Raises `UnsupportedError` for a format, or a use of it, that cannot be run.
    """
    method = checked_method(path, quantization)
    by_module: dict[str, dict[str, Load]] = {}
    for name, load in tensors(path):
        module, part = _cut(name)
        by_module.setdefault(module, {})[part] = load
    found: dict[str, PackedMatrix] = {}
    rounding = _input_rounding(quantization) if method == "compressed-tensors" else None
    for module, parts in by_module.items():
        try:
            kind = _kind_of(method, quantization, parts)
        except (ValueError, TypeError):
            group = shown(quantization.get("group_size"))
            raise UnsupportedError(f"{path} is quantized by {method} with the group_size {group}; {_cure()}") from None
        if kind is None:
            continue
        parameter = name_of(f"{module}.weight")
        owner = owners.get(parameter or "")
        if parameter is None or not isinstance(owner, nn.Linear):
            where = f"{module} ({type(owner).__name__})" if owner is not None else module
            raise UnsupportedError(
                f"{path}: {where} is quantized by {method}; only linear layers of the decoder and the head can be; "
                f"{_cure()}"
            )
        try:
            scale = parts.pop("input_scale", _nothing)() if rounding and rounding.is_static else None
            if scale is not None:
                _check_dtype("input_scale", scale.dtype)
            found[parameter] = _packed(kind, module, parts, owner.weight.shape)
            if rounding is not None:
                rounding.attach(owner, scale)
        except Exception as error:  # whatever fields and shapes of another kind lead to
            reason = one_line(error) if isinstance(error, ValueError) else named(error)
            raise UnsupportedError(f"{path}: {module} is quantized by {method}: {reason}; {_cure()}") from None
    if not found:
        raise UnsupportedError(f"{path} is quantized by {method} by its config.json, but holds no such tensors")
    return found


def checked_method(path: Path, quantization: Mapping[str, Any]) -> str:
    """What a config's quantization_config says that quantized the model; `UnsupportedError` if it cannot be run."""
    method = quantization.get("quant_method")
    if method is None and ("load_in_4bit" in quantization or "load_in_8bit" in quantization):
        method = "bitsandbytes"  # as its first checkpoints have it
    method = str(getattr(method, "value", method) or "")
    checks: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
        "bitsandbytes": lambda _: None,
        "compressed-tensors": _compressed_tensors_problem,
        "gptq": _gptq_problem,
        "awq": _awq_problem,
    }
    if method not in checks:
        raise UnsupportedError(
            f"{path} is quantized by {method or 'an unnamed method'}, which cannot be run; {_cure()}"
        )
    if problem := checks[method](quantization):
        raise UnsupportedError(f"{path} is quantized by {method} with {problem}, which cannot be run; {_cure()}")
    return method


def _input_rounding(quantization: Mapping[str, Any]) -> InputRounding | None:
    """How the inputs of packed layers are to be rounded: all in one way, unless `_compressed_tensors_problem`."""
    groups = [*(quantization.get("config_groups") or {}).values()]
    inputs = groups[0].get("input_activations") if groups else None
    return InputRounding.of(inputs) if inputs else None


def _nothing() -> torch.Tensor:
    raise ValueError("input_scale is missing")


def _packed(make: Any, module: str, parts: Mapping[str, Load], shape: torch.Size) -> PackedMatrix:
    kind: Any = make.func if isinstance(make, partial) else make
    states = [part for part in parts if part in _STATES]
    known = {*kind.names, *kind.optional, *kind.unread, *states, "bias"}
    if missing := sorted({*kind.names} - parts.keys()):
        raise ValueError(f"{missing[0]} is missing")
    if strange := sorted(parts.keys() - known):
        raise ValueError(f"it has a {strange[0]}, which is not understood")
    forms = {}
    for part in (*kind.names, *kind.optional):
        if part in parts:
            tensor = parts[part]()
            _check_dtype(part, tensor.dtype)
            forms[part] = PartForm(f"{module}.{part}", tensor.dtype, tensor.shape)
    if kind is FourBitBlocks:
        return FourBitBlocks(shape, forms, bytes(parts[states[0]]().tolist()))
    matrix: PackedMatrix = make(shape, forms)
    return matrix


def _check_dtype(part: str, dtype: torch.dtype) -> None:
    """Raise `ValueError` for scales that are codes themselves, and for words of another length."""
    if part in _SCALES and not (dtype.is_floating_point and dtype.itemsize > 1):
        raise ValueError(f"{part} is {str(dtype).removeprefix('torch.')}, no plain numbers")
    if part in _WORDS and dtype != torch.int32:
        raise ValueError(f"{part} is {str(dtype).removeprefix('torch.')}, not int32")


def _kind_of(method: str, quantization: Mapping[str, Any], parts: Iterable[str]) -> Any:
    """What makes the packed matrix of a module with these tensors; None if it is not quantized."""
    names = set(parts)
    if method == "bitsandbytes":
        return FourBitBlocks if names & {*_STATES} else EightBitRows if "SCB" in names else None
    if method == "compressed-tensors":
        return PackedIntegers if "weight_packed" in names else ScaledNumbers if "weight_scale" in names else None
    if "qweight" not in names:
        return None
    if method == "awq":
        return InterleavedRows
    # Version 1 stores zeros less one.
    lacks = 0 if quantization.get("checkpoint_format") == "gptq_v2" else 1
    group = int(quantization.get("group_size") or -1)
    return partial(PackedColumns, group=group if group > 0 else 1 << 62, zero_lacks=lacks)


def _compressed_tensors_problem(quantization: Mapping[str, Any]) -> str | None:
    told = quantization.get("config_groups") or {}
    if not isinstance(told, Mapping) or not all(isinstance(group, Mapping) for group in told.values()):
        return f"config_groups {shown(told)}"
    for holder in (quantization, *told.values()):
        layout, known = holder.get("format"), (*_LAYOUTS, "mixed-precision") if holder is quantization else _LAYOUTS
        if layout is not None and layout not in known:
            return f"the format {shown(layout)}"
    for group in told.values():
        weights = group.get("weights") or {}
        for key in ("weights", "input_activations"):
            if not isinstance(group.get(key) or {}, Mapping):
                return f"{key} {shown(group[key])}"
        if strange := _strange(group, _GROUP_FIELDS) or _strange(weights, _WEIGHT_FIELDS):
            return strange
        if weights.get("dynamic"):
            return "weights that are scaled anew at every use"
    groups = [*(quantization.get("config_groups") or {}).values()]
    for group in groups:
        inputs = group.get("input_activations")
        if inputs and (
            InputRounding.of(inputs) is None or any(each.get("input_activations") != inputs for each in groups)
        ):
            kind = "dynamic" if inputs.get("dynamic") else "static"
            return f"inputs in {inputs.get('num_bits')} bits by {inputs.get('strategy')} ({kind})"
        if group.get("output_activations"):
            return "outputs in fewer bits"
    sparsity = quantization.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        return "sparse weights"
    return _strange(quantization, _FIELDS)


def _strange(holder: Mapping[str, Any], known: tuple[str, ...]) -> str | None:
    """A field that says something, and is none of those whose meaning is honoured, or makes no difference here."""
    strange = next((key for key, value in holder.items() if value and key not in known), None)
    return None if strange is None else f"the field {shown(strange)}"


def _gptq_problem(quantization: Mapping[str, Any]) -> str | None:
    layout = quantization.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or quantization.get("is_marlin_format"):
        return f"the layout {shown(layout)}"
    words = quantization.get("pack_dtype") or "int32"
    if str(words).removeprefix("torch.") != "int32":
        return f"words of {shown(words)}"
    return next((f"the field {key}" for key in ("rotation", "adapter") if quantization.get(key)), None)


def _awq_problem(quantization: Mapping[str, Any]) -> str | None:
    version = str(quantization.get("version") or quantization.get("format") or "gemm").lower()
    bits = quantization.get("bits", quantization.get("w_bit", 4))
    return f"the layout {version}" if version != "gemm" else f"{bits} bits" if bits != 4 else None


def _cut(name: str) -> tuple[str, str]:
    """A tensor's module, and its name there; bitsandbytes names have dots in them."""
    head, dot, tail = name.rpartition(".weight.")
    return (head, f"weight.{tail}") if dot else (name.rpartition(".")[0], name.rpartition(".")[2])


def _cure() -> str:
    return _CURE.format(known=f"{', '.join(_KNOWN[:-1])} or {_KNOWN[-1]}")
