"""The file of a unit's stored bytes: safetensors, written atomically, with a checksum for each piece."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.reading import MAX_JSON_BYTES, find_file, open_file, parse_json
from engine.weights.read_ahead import PIECE_BYTES

_TENSOR = "bytes"
_BLOCK = 4096
"""The alignment of the data, as direct reads need it."""

PARTIAL = ".*.partial"
"""The name pattern of files that a killed writer leaves."""


class DamagedFileError(Exception):
    """A file is not what `write_unit` would have written."""


def write_unit(file: Path, layout: str, num_bytes: int, read: Callable[[int, int], torch.Tensor]) -> None:
    """Write `num_bytes`, pieces of which `read(first, end)` returns as uint8 host tensors; `OSError` leaves no file.

    layout: the meaning of the bytes; `open_unit` must get the same.
    """
    partial = file.with_name(f".{file.name}.partial")
    pieces = [(first, min(first + PIECE_BYTES, num_bytes)) for first in range(0, num_bytes, PIECE_BYTES)]
    sums = [0] * len(pieces)
    try:
        with partial.open("wb") as stream:
            start = len(_header(layout, num_bytes, sums))
            os.posix_fallocate(stream.fileno(), 0, start + num_bytes)
            stream.seek(start)
            for index, (first, end) in enumerate(pieces):
                piece: Any = read(first, end).numpy()
                sums[index] = zlib.crc32(piece)
                stream.write(piece)
            stream.seek(0)
            stream.write(_header(layout, num_bytes, sums))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def open_unit(file: Path, layout: str, num_bytes: int) -> tuple[torch.Tensor, list[int]]:
    """The mapped bytes uint8 `[num_bytes]` of a file, and the CRC-32 of each piece.

    Raises `FileNotFoundError`, and `DamagedFileError` for a path that is no file, cannot be read, or has another size
    or another header.
    """
    if not find_file(file, DamagedFileError):
        raise FileNotFoundError(file)
    with open_file(file, DamagedFileError) as stream:
        size = os.fstat(stream.fileno()).st_size
        start = stream.read(8)
        text = stream.read(min(int.from_bytes(start, "little"), size, MAX_JSON_BYTES))
    try:
        code = parse_json(text, str(file), DamagedFileError)["__metadata__"]["crc32"]
        sums = [int(code[at : at + 8], 16) for at in range(0, len(code), 8)]
    except (ValueError, KeyError, TypeError):
        raise DamagedFileError(str(file)) from None
    header = _header(layout, num_bytes, sums)
    if start + text != header or size != len(header) + num_bytes:
        raise DamagedFileError(str(file))
    try:
        handle: Any = safe_open(file, framework="pt")
    except SafetensorError:
        raise DamagedFileError(str(file)) from None
    tensor: torch.Tensor = handle.get_tensor(_TENSOR)
    return tensor, sums


def _header(layout: str, num_bytes: int, sums: list[int]) -> bytes:
    """Everything before the data; its length does not depend on the checksums."""
    entry = {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}
    metadata = {"layout": layout, "crc32": "".join(f"{each:08x}" for each in sums)}
    text = json.dumps({"__metadata__": metadata, _TENSOR: entry}).encode()
    size = -(-(8 + len(text)) // _BLOCK) * _BLOCK - 8
    return size.to_bytes(8, "little") + text.ljust(size)
