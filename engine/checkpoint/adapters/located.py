"""Finds a model's files; an adapter and its base model become one directory of links."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint.adapters.declared import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    LoraConfig,
    read_lora_config,
)
from engine.checkpoint.gguf.opened import gguf_directory, gguf_file
from engine.checkpoint.hub import resolve
from engine.checkpoint.side_files import OF_THE_MODEL, found_side_files, is_vocabulary
from engine.checkpoint.weight_files import chosen_name, weight_files
from engine.errors import CheckpointError, EngineError, UnsupportedError, shown
from engine.memory.paths import cache_directory, make_private
from engine.reading import find_file, reason


@dataclass(frozen=True)
class Located:
    """The location of a model's files."""

    path: Path
    """The local directory of the model; for an adapter, a directory of links to its files and to its base model's."""
    is_local: bool
    """Whether the model, and the base model of an adapter, is a local directory; otherwise its weights may still have
    to be downloaded."""
    tokenizer: str
    """The directory (absolute) or hub id that holds the tokenizer: the base model's for an adapter without one."""


def locate(model: str, *, download_weights: bool = True) -> Located:
    """Find a directory or a hub id, which may hold an adapter (an adapter_config.json without a config.json).

    A GGUF file, or a directory with one and without config.json, is located as the model directory made from it. Raises
    `CheckpointError` where model, adapter or base model are missing, `UnsupportedError` for an adapter that cannot be
    merged, or a GGUF file that cannot be run.
    """
    if (file := gguf_file(model)) is not None:
        directory = gguf_directory(file)
        return Located(directory, is_local=True, tokenizer=str(directory))
    path, is_local = resolve(model, download_weights=download_weights), _is_directory(model)
    if not _is_adapter(path):
        return Located(path, is_local, _absolute(model))
    named = _checked(path).base
    base, is_base_local = _base(path, named, download_weights=download_weights), _is_directory(named)
    own = _own_tokenizer(path)
    return Located(
        path=_linked(path, base, own, has_weights=download_weights or is_base_local),
        is_local=is_local and is_base_local,
        tokenizer=_absolute(model if own else named),
    )


def _is_directory(model: str) -> bool:
    return Path(model).expanduser().is_dir()


def _absolute(model: str) -> str:
    return os.path.abspath(os.path.expanduser(model)) if _is_directory(model) else model


def _is_adapter(path: Path) -> bool:
    has_config = find_file(path / "config.json", CheckpointError)
    return not has_config and find_file(path / ADAPTER_CONFIG, CheckpointError)


def _checked(path: Path) -> LoraConfig:
    """Read the configuration of an adapter's directory, and check that its weight file is there."""
    config = read_lora_config(path / ADAPTER_CONFIG)
    if find_file(path / ADAPTER_WEIGHTS, CheckpointError):
        return config
    other = ADAPTER_WEIGHTS.replace(".safetensors", ".bin")
    if find_file(path / other, CheckpointError):
        raise UnsupportedError(f"{path} holds {other}; save the adapter as {ADAPTER_WEIGHTS}, as peft does by default")
    raise CheckpointError(f"{path} holds {ADAPTER_CONFIG} and no {ADAPTER_WEIGHTS}; fetch the adapter again")


def _base(path: Path, named: str, *, download_weights: bool) -> Path:
    """Locate the base model of an adapter."""
    file = path / ADAPTER_CONFIG
    try:
        base = resolve(named, download_weights=download_weights)
    except EngineError as error:
        raise CheckpointError(
            f"{file} names the base model {shown(named)}, which cannot be found ({error}); write where it is as "
            "base_model_name_or_path"
        ) from None
    if _is_adapter(base):
        raise UnsupportedError(
            f"{file} names the base model {shown(named)}, which is an adapter itself; merge that one first"
        )
    return base


def _own_tokenizer(path: Path) -> list[Path]:
    """The tokenizer files in an adapter's directory, as saved in training; empty if there are none."""
    found = [file for file in found_side_files(path) if file.name not in OF_THE_MODEL]
    if found and not any(map(is_vocabulary, found)):
        raise CheckpointError(
            f"{path} holds {found[0].name} and no vocabulary, so whether it fits the base model's tokenizer is "
            "unknown; remove it, or copy the base model's tokenizer files there"
        )
    return found


def _linked(adapter: Path, base: Path, own: list[Path], *, has_weights: bool) -> Path:
    """A directory of links to the files of an adapter and of its base model; it is created if missing.

    Its name is a digest of the link targets. An existing directory is used only if it holds exactly these links:
    without the links to the adapter it would be the base model.
    """
    files = {f"{ADAPTER_FOLDER}/{name}": adapter / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    side = [file for file in found_side_files(base) if not own or file.name in OF_THE_MODEL]
    files |= {file.relative_to(base).as_posix(): file for file in (*side, *(_weights(base) if has_weights else ()))}
    files |= {file.relative_to(adapter).as_posix(): file for file in own}
    links = {link: os.path.abspath(file) for link, file in files.items()}
    text = "\n".join(f"{link}\0{file}" for link, file in sorted(links.items()))
    name = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', adapter.name)[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    folder = cache_directory() / "adapters"
    try:
        make_private(folder)
        if not _holds_just(folder / name, links):
            _drop_those_of_nothing(folder)
            _make(folder / name, links)
    except OSError as error:
        raise CheckpointError(
            f"the links to the files of {adapter} and its base model cannot be made in {folder}: {reason(error)}; "
            "XDG_CACHE_HOME names another directory"
        ) from None
    return folder / name


def _holds_just(folder: Path, links: Mapping[str, str]) -> bool:
    """Whether a directory holds exactly these links (link name to file), and nothing else."""
    found = (file for file in folder.rglob("*") if file.is_symlink() or not file.is_dir())
    return links == {
        file.relative_to(folder).as_posix(): os.readlink(file) if file.is_symlink() else None for file in found
    }


def _make(folder: Path, links: Mapping[str, str]) -> None:
    """Create a directory of links, replacing an older one atomically, so that no process sees a part of it."""
    scratch = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        (scratch / "new").mkdir(mode=0o700)
        for link, file in links.items():
            (scratch / "new" / link).parent.mkdir(parents=True, exist_ok=True)
            (scratch / "new" / link).symlink_to(file)
        with suppress(FileNotFoundError):  # there is none, or another process has taken it away
            folder.rename(scratch / "old")
        try:
            (scratch / "new").rename(folder)
        except OSError:
            if not _holds_just(folder, links):  # else another process has made it meanwhile
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _weights(base: Path) -> list[Path]:
    """The base model's weight files and their index."""
    chosen, files = chosen_name(base), weight_files(base)
    assert chosen is not None  # else there are no files, which is told
    return [*files, *([] if base / chosen in files else [base / chosen])]


def _drop_those_of_nothing(folder: Path) -> None:
    """Remove the links of adapters that no longer exist."""
    for other in folder.iterdir():
        if other.name[0] != "." and not (other / ADAPTER_FOLDER / ADAPTER_CONFIG).exists():
            shutil.rmtree(other, ignore_errors=True)
