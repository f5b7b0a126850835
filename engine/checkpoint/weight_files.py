"""Which files of a model directory are its weights, and whether they are whole."""

from __future__ import annotations

import json
from pathlib import Path

from engine.checkpoint.safetensors_header import read_safetensors_header
from engine.errors import CheckpointError, one_line


def weight_files(path: Path) -> list[Path]:
    """The weight files of a directory: safetensors if there are any, else `.bin`; complete by their index."""
    for pattern, index_name in (
        ("*.safetensors", "model.safetensors.index.json"),
        ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    ):
        index = path / index_name
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index} cannot be read: {one_line(error)}") from None
            missing = [name for name in names if not (path / name).is_file()]
            if missing:
                raise CheckpointError(f"{path} lacks {len(missing)} of {len(names)} weight files, e.g. {missing[0]}")
            return [path / name for name in names]
        files = sorted(path.glob(pattern))
        if files:
            return files
    raise CheckpointError(f"{path} has no weights (no *.safetensors, no pytorch_model*.bin)")


def checked_weight_bytes(path: Path) -> int:
    """Size of the weights; raises `CheckpointError` when files are missing or truncated."""
    files = weight_files(path)
    if files[0].suffix != ".safetensors":
        return sum(file.stat().st_size for file in files)
    headers = [read_safetensors_header(file) for file in files]
    _check_index(path, {name for header in headers for name in header})
    return sum(t["data_offsets"][1] - t["data_offsets"][0] for header in headers for t in header.values())


def _check_index(path: Path, present: set[str]) -> None:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        if missing := sorted(listed - present):
            raise CheckpointError(
                f"{path}: its index lists {len(missing)} tensors that its shards lack, e.g. {missing[0]}; "
                "fetch it again"
            )
