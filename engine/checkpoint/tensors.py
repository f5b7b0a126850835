"""The tensors of a model directory, memory-mapped and not read."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint.gguf.index import gguf_tensors, plain_places
from engine.checkpoint.safetensors_header import read_safetensors_header
from engine.checkpoint.weight_files import weight_files
from engine.errors import CheckpointError, UnsupportedError, one_line, shown
from engine.reading import open_file

if TYPE_CHECKING:
    import torch

_DTYPES = {
    **{"BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32"},
    **{"U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"},
    **{"C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
    **{"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
}
"""The torch dtypes of safetensors files, except those of less than a byte."""


def tensors(path: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Yield (name, load) for every tensor of a directory; `load()` maps the file, so it costs no anonymous memory.

    `.bin` files are opened by `torch.load(weights_only=True, mmap=True)` only, never as an open pickle.
    """
    file_of: dict[str, Path] = {}
    for file in weight_files(path):
        for name, load in tensors_of(file):
            if name in file_of:
                raise CheckpointError(
                    f"{path}: {shown(name)} is in {file_of[name].name} and in {file.name}; which one is meant "
                    "cannot be determined; download the model again"
                )
            file_of[name] = file
            yield name, load


def tensors_of(file: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Yield (name, load) for every tensor of one file, as `tensors` does."""
    if file.suffix == ".gguf":
        return gguf_tensors(file)
    return _safetensors(file) if file.suffix == ".safetensors" else _bin(file)


def tensor_places(path: Path) -> dict[str, tuple[Path, int]]:
    """The file and first byte of every tensor of safetensors files, which store tensors row by row."""
    places: dict[str, tuple[Path, int]] = {}
    for file in weight_files(path):
        if file.suffix == ".gguf":
            places.update(plain_places(file))
        elif file.suffix == ".safetensors":
            header = read_safetensors_header(file)
            ends = {name: entry["data_offsets"] for name, entry in header.items()}
            data = file.stat().st_size - max((end for _, end in ends.values()), default=0)
            places.update({name: (file, data + first) for name, (first, _) in ends.items()})
    return places


def _safetensors(file: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Views of one memory mapping of the file: since safetensors 0.8 the library's `get_tensor` reads it all."""
    import torch
    from safetensors import SafetensorError, safe_open

    header = read_safetensors_header(file)
    try:
        safe_open(file, framework="pt")  # what the library finds wrong with it
        storage: Any = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{file} cannot be read: {one_line(error)}; fetch it again") from None
    data = len(storage) - max((entry["data_offsets"][1] for entry in header.values()), default=0)
    for name, entry in header.items():
        yield name, lambda name=name, entry=entry: _view(file, storage, data, name, entry)  # type: ignore[misc]


def _view(file: Path, storage: torch.UntypedStorage, data: int, name: str, entry: Mapping[str, Any]) -> torch.Tensor:
    import torch

    kind = _DTYPES.get(entry["dtype"])
    if kind is None:
        raise UnsupportedError(f"{file}: {shown(name)} is of the type {entry['dtype']}, which is not understood")
    first, end = (data + offset for offset in entry["data_offsets"])
    dtype, shape = getattr(torch, kind), entry["shape"]
    if first == end:
        return torch.empty(shape, dtype=dtype)
    # A storage of its own: numbers need not begin at a multiple of their size.
    whole = torch.empty(0, dtype=torch.uint8).set_(storage[first:end])
    numbers: torch.Tensor = whole.view(dtype).view(shape)
    return numbers


def _bin(file: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    import torch

    open_file(file, CheckpointError).close()
    try:
        # Files of before torch 1.6 are no zip archives and cannot be mapped: they are read into memory.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{file} holds more than tensors, and loading it could run code: torch refuses it with weights_only; "
            "convert it to safetensors with a program that you trust, or take a safetensors checkpoint"
        ) from None
    except Exception as error:  # of a damaged file, torch raises what its reader happens to: KeyError, TypeError, …
        raise CheckpointError(f"{file} cannot be loaded: {one_line(error)}; fetch it again") from None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{file} holds a {type(state).__name__}; a mapping of names to tensors is expected there")
    for name, tensor in state.items():
        if isinstance(name, str) and isinstance(tensor, torch.Tensor):
            if tensor.layout is not torch.strided or tensor.is_meta:
                kind = "a tensor without numbers" if tensor.is_meta else f"a tensor of layout {tensor.layout}"
                raise CheckpointError(f"{file}: {shown(name)} is {kind}; plain tensors are expected there")
            yield name, lambda tensor=tensor: tensor  # type: ignore[misc]
