"""Protects: to know what tensors a checkpoint holds, nothing of them is read."""

from __future__ import annotations

import ctypes
import json
import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.tensors import tensors_of
from engine.errors import EngineError

COUNT, SIZE = 16, 1 << 20


def pages_in_memory(file: Path) -> int:
    """Pages of a file that the system holds in memory, by mincore of a mapping that nobody has touched."""
    libc = ctypes.CDLL(None, use_errno=True)
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapping:
        held = (ctypes.c_ubyte * -(-len(mapping) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapping)
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapping)), held) == 0
        del start
        return sum(each & 1 for each in held)


def test_shapes_are_known_without_reading(tmp_path: Path) -> None:
    """A hole, of which a page is in memory as soon as somebody reads it."""
    file = tmp_path / "model.safetensors"
    entries = {
        f"t{index}": {"dtype": "U8", "shape": [SIZE], "data_offsets": [index * SIZE, (index + 1) * SIZE]}
        for index in range(COUNT)
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + COUNT * SIZE)
    found = {name: load() for name, load in tensors_of(file)}
    assert {name: tuple(values.shape) for name, values in found.items()} == dict.fromkeys(entries, (SIZE,))
    assert pages_in_memory(file) < COUNT * SIZE // mmap.PAGESIZE // 4
    assert all(int(values.sum()) == 0 for values in found.values())
    assert pages_in_memory(file) > COUNT * SIZE // mmap.PAGESIZE // 2


KINDS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e8m0fnu, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32),
    *(torch.uint64, torch.bool, torch.complex64),
)


def test_tensors_of_every_kind_are_those_of_the_library(tmp_path: Path) -> None:
    """Also where they begin at no multiple of their size, and where they have no numbers."""
    file = tmp_path / "model.safetensors"
    codes = torch.randint(0, 2, (2, 3, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    state = {str(kind): codes.view(kind).clone() for kind in KINDS} | {
        "a": codes[0, 0, :3].clone(),
        "none": torch.zeros(0, 4),
    }
    save_file(state, file)
    expected, found = load_file(file), {name: load() for name, load in tensors_of(file)}
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape)
        assert found[name].view(torch.uint8).equal(values.view(torch.uint8))


def test_numbers_of_less_than_a_byte_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    text = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0")
    ((_, load),) = tensors_of(file)
    with pytest.raises(EngineError, match="'x' is of the type F4"):
        load()
