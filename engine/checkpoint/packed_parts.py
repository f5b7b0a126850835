"""Finds the matrices of a checkpoint that comes quantized, or says why it cannot be run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.checkpoint.tensors import tensors
from engine.errors import UnsupportedError
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
    by_module: dict[str, dict[str, Load]] = {}
    for name, load in tensors(path):
        module, part = _cut(name)
        by_module.setdefault(module, {})[part] = load
    found: dict[str, PackedMatrix] = {}
    rounding = _input_rounding(quantization)
    for module, parts in by_module.items():
        kind = _kind_of(method, quantization, parts)
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
            found[parameter] = _packed(kind, module, parts, owner.weight.shape)
            if rounding is not None:
                rounding.attach(owner, scale)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UnsupportedError(f"{path}: {module} is quantized by {method}: {reason}; {_cure()}") from None
    if not found:
        raise UnsupportedError(f"{path} is quantized by {method} by its config.json, but holds no such tensors")
    return found


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
            forms[part] = PartForm(f"{module}.{part}", tensor.dtype, tensor.shape)
    if kind is FourBitBlocks:
        return FourBitBlocks(shape, forms, bytes(parts[states[0]]().tolist()))
    matrix: PackedMatrix = make(shape, forms)
    return matrix


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
    if (quantization.get("sparsity_config") or {}).get("format", "dense") != "dense":
        return "sparse weights"
    return next((key for key in ("kv_cache_scheme", "transform_config") if quantization.get(key)), None)


def _gptq_problem(quantization: Mapping[str, Any]) -> str | None:
    layout = quantization.get("checkpoint_format") or "gptq"
    return f"the layout {layout}" if layout not in ("gptq", "gptq_v2") or quantization.get("is_marlin_format") else None


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
