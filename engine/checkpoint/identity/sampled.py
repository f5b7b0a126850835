"""Digests of samples of a checkpoint: keys of stored encoded weights, and of the caches of earlier releases."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from engine.checkpoint.adapters.declared import ADAPTER_CONFIG, adapter_folder
from engine.checkpoint.safetensors_header import read_safetensors_header
from engine.checkpoint.side_files import MAX_SIDE_BYTES, SIDE_FILES, TOKENIZER_FILES
from engine.checkpoint.weight_files import all_weight_files, weight_files
from engine.errors import CheckpointError
from engine.reading import find_file, open_file, read_bytes


def sampled_fingerprint(path: Path) -> str | None:
    """The hex digest by which earlier releases identified a model directory, to find the answers that they cached.

    None for an adapter: they could not run one, and the digest would be its base model's.

    For weight files outside the hub's cache it covers the header and a sample of every tensor (safetensors), or 1024
    spots (`.bin`): equal digests do not prove that the weights are equal.
    """
    if adapter_folder(path) is not None:
        return None
    digest = hashlib.sha256()
    for name in sorted({*TOKENIZER_FILES, *SIDE_FILES}):
        file = path / name
        if find_file(file, CheckpointError):
            content = read_bytes(file, CheckpointError, limit=MAX_SIDE_BYTES)
            digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    for file in weight_files(path):
        digest.update(_file_digest(file))
    return digest.hexdigest()


def weights_state(path: Path) -> str:
    """The hex digest of the files from which a model's weights are made: config.json, weight files, adapter.

    It is like `sampled_fingerprint`, but changes also with the modification time of a weight file outside the hub's
    cache.
    """
    digest = hashlib.sha256(read_bytes(path / "config.json", CheckpointError, limit=MAX_SIDE_BYTES))
    if (adapter := adapter_folder(path)) is not None:
        digest.update(read_bytes(adapter / ADAPTER_CONFIG, CheckpointError, limit=MAX_SIDE_BYTES))
    for file in all_weight_files(path):
        digest.update(_file_digest(file))
        if not _is_blob(file):
            digest.update(str(file.stat().st_mtime_ns).encode())
    return digest.hexdigest()


def _is_blob(file: Path) -> bool:
    """Whether a file belongs to the hub's cache, where its name is a digest of its content."""
    return file.resolve().parent.name == "blobs"


def _file_digest(file: Path) -> bytes:
    digest = hashlib.sha256(file.name.encode() + b"\0" + str(file.stat().st_size).encode())
    if _is_blob(file):
        digest.update(file.resolve().name.encode())
    else:
        with open_file(file, CheckpointError) as stream:
            for offset in _sample_offsets(file):
                stream.seek(offset)
                digest.update(stream.read(256))
    return digest.digest()


def _sample_offsets(file: Path) -> Iterator[int]:
    size = file.stat().st_size
    if file.suffix != ".safetensors":
        yield from range(0, size, max(size // 1024, 256))
        return
    header = read_safetensors_header(file)
    with open_file(file, CheckpointError) as stream:
        data = 8 + int.from_bytes(stream.read(8), "little")
    yield from range(0, data, 256)
    for entry in header.values():
        first, end = entry["data_offsets"]
        yield from (data + first + (end - first) * part // 4 for part in range(4))
