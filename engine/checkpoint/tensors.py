"""The tensors of a model directory, mapped and not read."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint.safetensors_header import read_safetensors_header
from engine.checkpoint.weight_files import weight_files
from engine.errors import CheckpointError, one_line, shown
from engine.reading import open_file

if TYPE_CHECKING:
    import torch


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
                    "cannot be told; fetch the model again"
                )
            file_of[name] = file
            yield name, load


def tensors_of(file: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Yield (name, load) for every tensor of one file, as `tensors` does."""
    return _safetensors(file) if file.suffix == ".safetensors" else _bin(file)


def tensor_places(path: Path) -> dict[str, tuple[Path, int]]:
    """File and first byte of every tensor that lies in a safetensors file, row by row, as their format has it."""
    places: dict[str, tuple[Path, int]] = {}
    for file in weight_files(path):
        if file.suffix == ".safetensors":
            header = read_safetensors_header(file)
            ends = {name: entry["data_offsets"] for name, entry in header.items()}
            data = file.stat().st_size - max((end for _, end in ends.values()), default=0)
            places.update({name: (file, data + first) for name, (first, _) in ends.items()})
    return places


def _safetensors(file: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    from safetensors import SafetensorError, safe_open

    read_safetensors_header(file)
    try:
        handle: Any = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {one_line(error)}; fetch it again") from None
    for name in handle.keys():  # noqa: SIM118 - not a mapping
        yield name, lambda name=name: handle.get_tensor(name)  # type: ignore[misc]


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
