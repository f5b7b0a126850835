"""Reads how a model directory says that it is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import CheckpointError, UnsupportedError, shown
from engine.reading import find_file, read_json_object

if TYPE_CHECKING:
    import torch

MODELOPT_FILE = "hf_quant_config.json"
"""The file in which ModelOpt describes the quantization; config.json may not mention it."""
_MODELOPT_FIELDS = ("producer", "quantization")


def declared_quantization(path: Path, told: Any) -> Mapping[str, Any] | None:
    """The quantization_config of config.json (`told`), else ModelOpt's file; None if there is neither.

    Raises `CheckpointError` for a file that cannot be read, `UnsupportedError` for one that is not understood.
    """
    if told:
        found: Mapping[str, Any] = told if isinstance(told, Mapping) else told.to_dict()
        return found
    file = path / MODELOPT_FILE
    if not find_file(file, CheckpointError):
        return None
    content = read_json_object(file, CheckpointError)
    inner = content.get("quantization")
    producer = content.get("producer") or {}
    name = producer.get("name") if isinstance(producer, Mapping) else None
    if not isinstance(inner, Mapping) or name != "modelopt":
        raise UnsupportedError(
            f"{file}: the quantization {shown(inner)} of the producer {shown(name or producer)}; an object, by "
            "modelopt, is understood there"
        )
    if strange := [key for key, value in content.items() if value and key not in _MODELOPT_FIELDS]:
        raise UnsupportedError(
            f"{file}: the field {shown(strange[0])} is not understood; take the unquantized checkpoint"
        )
    return (
        {**inner, "quant_method": "modelopt"} if inner.get("quant_algo") or inner.get("kv_cache_quant_algo") else None
    )


def check_numbers(path: Path, name: str, stored: torch.dtype, expected: torch.dtype) -> None:
    """Raise `UnsupportedError` for the codes of a quantized matrix where plain numbers are expected."""
    if expected.is_floating_point and not (stored.is_floating_point and stored.itemsize > 1):
        raise UnsupportedError(
            f"{path}: {name} is stored as {str(stored).removeprefix('torch.')} in the weight files, and the "
            "quantization_config of config.json does not say what that stands for; take a checkpoint with plain "
            "numbers, or one whose config.json says how it is quantized"
        )
