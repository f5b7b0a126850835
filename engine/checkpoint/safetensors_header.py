"""The header of a safetensors file: which tensors are in it, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError


def read_safetensors_header(file: Path) -> dict[str, Any]:
    """Tensor entries of a safetensors header (format of the safetensors README); checks the file's length."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{file} is truncated: {size} bytes cannot hold its header; fetch it again")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise CheckpointError(f"{file} is damaged: its safetensors header makes no sense; fetch it again") from None
    if size != expected:
        raise CheckpointError(f"{file} is truncated: {size} bytes instead of {expected}; fetch it again")
    return header
