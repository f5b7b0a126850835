"""GPTQ, AWQ and AutoRound: integers packed into 32-bit words of a transposed matrix."""

from __future__ import annotations

from engine.checkpoint.quantized.method import Kind, Loads, Method, Told, strange
from engine.errors import shown
from engine.kernels.packed.columns import InterleavedRows, PackedColumns

_AUTO_ROUND = {
    "auto_round": "gptq_v2",
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
}
"""AutoRound's packing names and the method they correspond to: its own packing is GPTQ's version 2."""
_AUTO_ROUND_FIELDS = (
    *("quant_method", "bits", "group_size", "sym", "packing_format", "autoround_version", "data_type", "dataset"),
    *("iters", "nsamples", "seqlen", "batch_size", "gradient_accumulate_steps", "lr", "minmax_lr", "low_gpu_mem_usage"),
    *(
        "low_cpu_mem_usage",
        "enable_quanted_input",
        "enable_minmax_tuning",
        "scale_dtype",
        "amp",
        "to_quant_block_names",
    ),
    *("block_name_to_quantize", "quant_block_list", "damp_percent", "desc_act", "true_sequential", "static_groups"),
    *(
        "quant_nontext_module",
        "super_bits",
        "super_group_size",
        "enable_norm_bias_tuning",
        "enable_alg_ext",
        "act_bits",
    ),
    *("act_dynamic", "act_sym", "act_group_size", "act_data_type", "extra_config", "backend"),
)


def _gptq_problem(told: Told) -> str | None:
    layout = told.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or told.get("is_marlin_format"):
        return f"the layout {shown('marlin' if told.get('is_marlin_format') else layout)}"
    words = told.get("pack_dtype") or "int32"
    if str(words).removeprefix("torch.") != "int32":
        return f"words of {shown(words)}"
    return next((f"the field {key}" for key in ("rotation", "adapter") if told.get(key)), None)


def _awq_problem(told: Told) -> str | None:
    version = str(told.get("version") or told.get("format") or "gemm").lower()
    bits = told.get("bits", told.get("w_bit", 4))
    return f"the layout {version}" if version != "gemm" else f"{bits} bits" if bits != 4 else None


def _auto_round_problem(told: Told) -> str | None:
    if (packing := told.get("packing_format")) not in _AUTO_ROUND:
        return f"the packing_format {shown(packing)}"
    if (kind := told.get("data_type") or "int") not in ("int", "int_sym", "int_asym"):
        return f"the data_type {shown(kind)}"
    if (bits := told.get("act_bits") or 16) < 16:
        return f"inputs in {bits} bits"
    if found := strange(told, _AUTO_ROUND_FIELDS):
        return found
    for name, layer in (told.get("extra_config") or {}).items():
        if not {*layer} <= {"bits", "group_size", "sym", "data_type", "act_bits"}:
            return f"the extra_config {shown(layer)} of {shown(name)}"
        if layer.get("group_size", told.get("group_size")) != told.get("group_size"):
            return f"groups of another size for {shown(name)}"
    return None


def _gptq_kind(told: Told, parts: Loads, is_expert: bool) -> Kind | None:
    return _columns(told, parts, version_2=told.get("checkpoint_format") == "gptq_v2")


def _awq_kind(told: Told, parts: Loads, is_expert: bool) -> Kind | None:
    return Kind.of(InterleavedRows) if "qweight" in parts else None


def _auto_round_kind(told: Told, parts: Loads, is_expert: bool) -> Kind | None:
    packing = _AUTO_ROUND[told["packing_format"]]
    if packing == "awq":
        return _awq_kind(told, parts, is_expert)
    return _columns(told, parts, version_2=packing == "gptq_v2")


def _columns(told: Told, parts: Loads, *, version_2: bool) -> Kind | None:
    if "qweight" not in parts:
        return None
    try:
        group = int(told.get("group_size") or -1)
    except (ValueError, TypeError):
        raise ValueError(f"the group_size is {shown(told.get('group_size'))}") from None
    # Version 1 stores zeros less one.
    return Kind.of(PackedColumns, group=group if group > 0 else 1 << 62, zero_lacks=0 if version_2 else 1)


GPTQ = Method(_gptq_problem, _gptq_kind)
AWQ = Method(_awq_problem, _awq_kind)
AUTO_ROUND = Method(_auto_round_problem, _auto_round_kind)
