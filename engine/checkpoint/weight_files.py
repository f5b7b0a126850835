"""Finds the weight files of a model directory, in `transformers`' order, and checks that they are complete."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from engine.checkpoint.adapters.declared import ADAPTER_FOLDER, ADAPTER_WEIGHTS
from engine.checkpoint.config import read_config
from engine.checkpoint.gguf.index import GGUF_FILE, GGUF_INDEX
from engine.checkpoint.safetensors_header import read_safetensors_header
from engine.errors import CheckpointError, shown
from engine.reading import find_file, open_file, read_json_object

CHOICES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The first of these names that exists is the checkpoint, unless config.json names a file itself."""
_INDEX = ".index.json"
_NAMED = "transformers_weights"
"""The key of config.json that names a weight file."""


def weight_files(path: Path) -> list[Path]:
    """The files that hold the model's weights, as `transformers` chooses them; other weight files are not read."""
    chosen = chosen_name(path)
    if chosen is None:
        raise CheckpointError(f"{path} has no weights: none of {', '.join(CHOICES)}{_others(path)}")
    if not chosen.endswith(_INDEX):
        return [path / chosen]
    names = sorted(set(weight_map(path / chosen).values()))
    missing = [name for name in names if not find_file(path / name, CheckpointError)]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of {len(names)} weight files that {chosen} lists, e.g. {missing[0]}; fetch "
            "it again"
        )
    return [path / name for name in names]


def all_weight_files(path: Path) -> list[Path]:
    """`weight_files`, and those of the adapter that changes them, if there is one."""
    adapter = path / ADAPTER_FOLDER / ADAPTER_WEIGHTS
    return [*weight_files(path), *([adapter] if find_file(adapter, CheckpointError) else [])]


def chosen_name(path: Path) -> str | None:
    """The weight file or weight index of a model directory; None where there is none."""
    named = named_weights(path)
    if named is not None and not find_file(path / named, CheckpointError):
        raise CheckpointError(f"{path} has no {named}, which its config.json names as {_NAMED}")
    found = named or next((name for name in CHOICES if find_file(path / name, CheckpointError)), None)
    return found or (GGUF_FILE if find_file(path / GGUF_INDEX, CheckpointError) else None)


def named_weights(path: Path) -> str | None:
    """The weight file or index that config.json names, if it does."""
    named = read_config(path).get(_NAMED) if find_file(path / "config.json", CheckpointError) else None
    if named is None:
        return None
    if not isinstance(named, str) or not named.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(
            f"{path / 'config.json'}: {_NAMED} is {shown(named)}; a *.safetensors file or its index is expected there"
        )
    _check_inside(named, path / "config.json")
    return named


def weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, by a weight index."""
    listed = read_json_object(index, CheckpointError).get("weight_map")
    suffix = ".safetensors" if index.name.endswith(".safetensors.index.json") else ".bin"
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(
            f"{index}: weight_map is {shown(listed)}; an object is expected there, with the file of each tensor"
        )
    for tensor, name in listed.items():
        if not isinstance(name, str) or not name.endswith(suffix):
            raise CheckpointError(
                f"{index}: the file of {shown(tensor)} is {shown(name)}; the name of a *{suffix} file is expected there"
            )
    for name in set(listed.values()):
        _check_inside(name, index)
    return listed


def checked_weight_bytes(path: Path) -> int:
    """Size of the weights; raises `CheckpointError` when files are missing, truncated or cannot be opened."""
    files = weight_files(path)
    if files[0].suffix != ".safetensors":
        for file in files:
            open_file(file, CheckpointError).close()
        return sum(file.stat().st_size for file in files)
    headers = [read_safetensors_header(file) for file in files]
    _check_index(path, {name for header in headers for name in header})
    return sum(t["data_offsets"][1] - t["data_offsets"][0] for header in headers for t in header.values())


def _check_index(path: Path, present: set[str]) -> None:
    chosen = chosen_name(path)
    if chosen is None or not chosen.endswith(_INDEX):
        return
    if missing := sorted(weight_map(path / chosen).keys() - present):
        raise CheckpointError(
            f"{path}: its index lists {len(missing)} tensors that its shards lack, e.g. {missing[0]}; fetch it again"
        )


def _check_inside(name: str, source: Path) -> None:
    """Raise `CheckpointError` for the name of a weight file that leads out of the model's directory."""
    inner = PurePosixPath(name)
    if inner.is_absolute() or ".." in inner.parts or "\0" in name or len(name) > 1000:
        raise CheckpointError(f"{source} names {shown(name)}, which is no file inside the model's directory")


def _others(path: Path) -> str:
    """Names of other files in the directory that look like weights, for messages."""
    suffixes = (".safetensors", ".bin", ".gguf", ".pth", ".pt", ".h5", ".msgpack")
    found = sorted(file.name for file in path.iterdir() if file.name.endswith(suffixes))
    named = "; a GGUF file is read if it is named itself" if any(name.endswith(".gguf") for name in found) else ""
    listed = f"{', '.join(map(shown, found[:3]))}{' ...' if len(found) > 3 else ''}"
    return f"; of {listed} none is read{named}" if found else ""
