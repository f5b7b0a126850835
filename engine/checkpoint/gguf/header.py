"""The header of a GGUF file: whether what it counts is there, which the gguf package's reader does not ask."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import NoReturn

from engine.errors import CheckpointError, UnsupportedError
from engine.reading import open_file

_VERSIONS = (2, 3)
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value of each kind that has a size of its own."""
_STRING, _ARRAY = 8, 9
_MOST_NESTED = 4
_MOST_DIMENSIONS = 4
"""ggml's."""
_LEAST_FIELD, _LEAST_TENSOR = 13, 32
"""Bytes: of a field with a name of no characters, and of a tensor likewise, of one dimension."""


def check_header(file: Path, shown_as: Path) -> None:
    """Raise `CheckpointError` for a header that counts more than the file holds; messages name it `shown_as`.

    Counts are read 64 bits wide, and the package's reader goes on behind the end of a file, where it finds nothing, as
    often as they say. `UnsupportedError` for the other byte order, whose numbers nobody here turns round.
    """
    with open_file(file, CheckpointError, where=str(shown_as)) as stream:
        try:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # no bytes
            _damaged(shown_as, "it is empty")
        with content:
            _Walk(content, shown_as).check()


class _Walk:
    """Goes through a header from its first byte on."""

    def __init__(self, content: mmap.mmap, file: Path) -> None:
        self._content, self._file, self._at = content, file, 4  # behind the four letters

    def check(self) -> None:
        version = self._number("I")
        if version & 0xFFFF == 0 and version:
            raise UnsupportedError(f"{self._file} is in big-endian byte order; take a file in little-endian order")
        if version not in _VERSIONS:
            raise UnsupportedError(f"{self._file} is of version {version} of the format; {_VERSIONS} are read")
        num_tensors, num_fields = self._number("Q"), self._number("Q")
        self._expect(num_fields, _LEAST_FIELD, "fields")
        for _ in range(num_fields):
            self._string()
            self._value(self._number("I"), 0)
        self._expect(num_tensors, _LEAST_TENSOR, "tensors")
        for _ in range(num_tensors):
            self._string()
            dimensions = self._number("I")
            if dimensions > _MOST_DIMENSIONS:
                _damaged(self._file, f"a tensor of {dimensions} dimensions")
            self._skip(8 * dimensions + 4 + 8)

    def _value(self, kind: int, depth: int) -> None:
        if kind in _SIZES:
            self._skip(_SIZES[kind])
        elif kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            inner, count = self._number("I"), self._number("Q")
            if inner in _SIZES:
                self._skip(_SIZES[inner] * count)
                return
            if depth == _MOST_NESTED:
                _damaged(self._file, f"arrays that are nested more than {_MOST_NESTED} deep")
            self._expect(count, 8, "values of an array")
            for _ in range(count):
                self._value(inner, depth + 1)
        else:
            _damaged(self._file, f"a value of the kind {kind}")

    def _string(self) -> None:
        self._skip(self._number("Q"))

    def _number(self, form: str) -> int:
        begin = self._at
        self._skip(struct.calcsize(form))
        return int(struct.unpack_from(f"<{form}", self._content, begin)[0])

    def _skip(self, size: int) -> None:
        self._expect(size, 1, "bytes")
        self._at += size

    def _expect(self, count: int, size: int, what: str) -> None:
        """Raise `CheckpointError` unless there is room for so many of so many bytes."""
        left = len(self._content) - self._at
        if count * size > left:
            _damaged(self._file, f"{count:,} {what} at byte {self._at:,}, after which there are {left:,} bytes")


def _damaged(file: Path, why: str) -> NoReturn:
    raise CheckpointError(f"{file} is damaged: its header describes {why}; fetch it again")
