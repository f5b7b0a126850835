"""The supported quantization methods of checkpoints, by their names in configs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint.config import text_config
from engine.checkpoint.quantized.compressed import COMPRESSED_TENSORS
from engine.checkpoint.quantized.declared import declared_quantization
from engine.checkpoint.quantized.floats import FBGEMM_FP8, FP8, MODELOPT, MXFP4
from engine.checkpoint.quantized.ggml import GGUF
from engine.checkpoint.quantized.method import Kind, Loads, Method, Told
from engine.checkpoint.quantized.words import AUTO_ROUND, AWQ, GPTQ
from engine.errors import UnsupportedError, named
from engine.kernels.packed.bitsandbytes import QUANT_STATES, EightBitRows, FourBitBlocks

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _bitsandbytes_kind(told: Told, parts: Loads, is_expert: bool) -> Kind | None:
    state = next((parts[name] for name in QUANT_STATES if name in parts), None)
    if state is not None:
        return Kind(FourBitBlocks, {"state": bytes(state().tolist())}, is_for_experts=False)
    return Kind(EightBitRows, {}, is_for_experts=False) if "SCB" in parts else None


BITSANDBYTES = Method(lambda _: None, _bitsandbytes_kind)
METHODS: dict[str, Method] = {
    "bitsandbytes": BITSANDBYTES,
    "compressed-tensors": COMPRESSED_TENSORS,
    "fp8": FP8,
    "fbgemm_fp8": FBGEMM_FP8,
    "mxfp4": MXFP4,
    "modelopt": MODELOPT,
    "gptq": GPTQ,
    "awq": AWQ,
    "auto-round": AUTO_ROUND,
    "gguf": GGUF,
}


def checked_method(path: Path, quantization: Told) -> str:
    """The name of the quantization method that a config declares; `UnsupportedError` if it cannot be run."""
    method = quantization.get("quant_method")
    if method is None and ("load_in_4bit" in quantization or "load_in_8bit" in quantization):
        method = "bitsandbytes"  # as its first checkpoints have it
    method = str(getattr(method, "value", method) or "")
    if method not in METHODS:
        raise UnsupportedError(f"{path} is quantized by {method or 'an unnamed method'}, which cannot be run; {cure()}")
    try:
        problem = METHODS[method].problem(quantization)
    except Exception as error:  # whatever fields of another kind lead to
        problem = f"invalid fields ({named(error)})"
    if problem:
        raise UnsupportedError(f"{path} is quantized by {method} with {problem}, which cannot be run; {cure()}")
    return method


def left_unrounded(path: Path, config: Mapping[str, Any]) -> str | None:
    """What a directory's format rounds in addition to weights and the engine does not, in words; None if nothing.

    config: its config.json. Raises `UnsupportedError` as `checked_method` does.
    """
    told = declared_quantization(path, config.get("quantization_config"))
    if told is None:
        return None
    counts = [text_config(config).get(key) for key in _EXPERT_KEYS]
    return METHODS[checked_method(path, told)].unrounded(told, any(counts))


def cure() -> str:
    """Advice about a checkpoint that cannot be run."""
    *others, last = METHODS
    return f"take the unquantized checkpoint, or one that is {', '.join(others)} or {last}"
