"""Reads the header of a safetensors file: its tensors and where they are."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NoReturn

from engine.errors import CheckpointError, shown
from engine.reading import MAX_JSON_BYTES, open_file, parse_json

_LARGEST = 1 << 62
_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64},
    **{"F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
"""The number of bits of each dtype, as in the format's library."""


def read_safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor entries of a safetensors header (format of the safetensors README); checks the file's length."""
    with open_file(file, CheckpointError) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{file} is truncated: {size} bytes cannot hold its header; fetch it again")
        if length > MAX_JSON_BYTES:
            _damaged(file, f"a header of {length:,} bytes")
        text = stream.read(length)
    try:
        header = parse_json(text, str(file), CheckpointError)
    except CheckpointError as error:
        _damaged(file, str(error).removeprefix(f"{file} "))
    if not isinstance(header, dict):
        _damaged(file, f"it is {shown(header)}")
    header.pop("__metadata__", None)
    end = 0
    for name, entry in header.items():
        end = max(end, _end_of(file, name, entry))
    if size != 8 + length + end:
        kind = "truncated" if size < 8 + length + end else "damaged"
        raise CheckpointError(f"{file} is {kind}: {size} bytes instead of {8 + length + end}; fetch it again")
    return header


def _end_of(file: Path, name: str, entry: Any) -> int:
    """The end of a tensor's data; raises `CheckpointError` unless its header entry is consistent."""
    told = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = told.get("dtype"), told.get("shape"), told.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        _damaged(file, f"{shown(name)} has the dtype {shown(dtype)}")
    if not isinstance(shape, list) or not all(_is_size(each) for each in shape):
        _damaged(file, f"{shown(name)} has the shape {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(each) for each in offsets):
        _damaged(file, f"{shown(name)} has the data_offsets {shown(offsets)}")
    begin, end = offsets
    if math.prod(shape) * _BITS[dtype] != 8 * (end - begin):
        _damaged(file, f"{shown(name)} has {end - begin} bytes, which are not its shape {shown(shape)} in {dtype}")
    return int(end)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _damaged(file: Path, why: str) -> NoReturn:
    raise CheckpointError(f"{file} is damaged: its safetensors header makes no sense ({why}); fetch it again") from None
