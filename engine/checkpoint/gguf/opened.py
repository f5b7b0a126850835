"""Makes a model directory of a GGUF file: a link to it, an index of its tensors, its config and its tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from engine.checkpoint.adapters.declared import ADAPTER_CONFIG
from engine.checkpoint.gguf.index import GGUF_FILE, GGUF_INDEX, index_of
from engine.checkpoint.gguf.tokenizer import check_tokenizer, ends_of_text
from engine.checkpoint.side_files import OF_THE_MODEL, found_side_files, is_vocabulary
from engine.errors import CheckpointError
from engine.memory.paths import cache_directory
from engine.reading import expand_home, find_file, open_file, reason

if TYPE_CHECKING:
    from engine.checkpoint.gguf.contents import Contents

_MAGIC = b"GGUF"
_FORM = "2"
"""The version of the directories made here; directories of another version are not used."""


def gguf_file(model: str) -> Path | None:
    """The GGUF file that `model` names: a file, or the only one in a directory without config.json and adapter.

    None for anything else. Raises `CheckpointError` where a directory has several.
    """
    path = expand_home(model, CheckpointError, "model")
    try:
        if path.suffix == ".gguf" and find_file(path, CheckpointError):
            return path
        if not path.is_dir() or any(
            find_file(path / name, CheckpointError) for name in ("config.json", ADAPTER_CONFIG)
        ):
            return None
        found = sorted(file for file in path.iterdir() if file.suffix == ".gguf")
    except (OSError, ValueError):
        return None  # whoever looks it up next tells
    if len(found) > 1:
        raise CheckpointError(
            f"{path} holds {len(found)} GGUF files, {found[0].name} and {found[1].name} among them; name one of them"
        )
    return found[0] if found else None


def gguf_directory(file: Path) -> Path:
    """The model directory made from a GGUF file; it is created in the user's cache directory if missing.

    Its name is a digest of the file's path, size and time, of the versions of the packages that read it, and of the
    tokenizer files next to it, which replace the file's own tokenizer if no other GGUF file is in that directory.
    Raises what `read_contents` raises.
    """
    with open_file(file, CheckpointError) as stream:
        magic, status = stream.read(len(_MAGIC)), os.fstat(stream.fileno())
    if magic != _MAGIC:
        raise CheckpointError(f"{file} is no GGUF file: it begins with {magic!r}, not with {_MAGIC!r}")
    beside = _tokenizer_beside(file)
    told = [
        *(os.path.abspath(each) for each in (file, *beside)),
        str(status.st_size),
        str(status.st_mtime_ns),
        _FORM,
        _version("transformers"),
        _version("gguf"),
    ]
    digest = hashlib.sha256("\0".join(told).encode()).hexdigest()[:16]
    name = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', file.stem)[:80]}-{digest}"
    folder = cache_directory() / "gguf"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / name / GGUF_INDEX).is_file():
            _drop_those_of_nothing(folder)
            _make(folder / name, file, beside)
    except OSError as error:
        raise CheckpointError(
            f"the model directory of {file} cannot be made in {folder}: {reason(error)}; XDG_CACHE_HOME names another "
            "directory"
        ) from None
    return folder / name


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _tokenizer_beside(file: Path) -> list[Path]:
    """The tokenizer files in the directory of a GGUF file that is alone there; empty without a vocabulary."""
    if len([each for each in file.parent.iterdir() if each.suffix == ".gguf"]) > 1:
        return []
    found = [each for each in found_side_files(file.parent) if each.name not in OF_THE_MODEL]
    return found if any(map(is_vocabulary, found)) else []


def _make(directory: Path, file: Path, beside: list[Path]) -> None:
    """Create a model directory atomically, so that no process sees a part of it."""
    from engine.checkpoint.gguf.contents import read_contents  # loads torch, which a directory that is there does not
    from engine.checkpoint.tokenizer import load_tokenizer

    scratch = Path(tempfile.mkdtemp(prefix=".", dir=directory.parent))
    try:
        (scratch / GGUF_FILE).symlink_to(os.path.abspath(file))
        contents = read_contents(scratch, file, has_tokenizer=not beside)
        _write(scratch, contents)
        if not beside:
            check_tokenizer(load_tokenizer(scratch), contents.told, file)  # as it will be loaded
        for each in beside:
            link = scratch / each.relative_to(file.parent)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(os.path.abspath(each))
        scratch.chmod(0o755)
        try:
            scratch.rename(directory)
        except OSError:
            if not (directory / GGUF_INDEX).is_file():  # else another process has made it meanwhile, and may read it
                shutil.rmtree(directory, ignore_errors=True)
                scratch.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(folder: Path, contents: Contents) -> None:
    if contents.tokenizer is not None:
        contents.tokenizer.save_pretrained(folder)
        _drop_added(folder / "tokenizer.json", len(contents.told["tokenizer.ggml.tokens"]))
    (folder / "config.json").write_text(json.dumps(contents.config, indent=1), encoding="utf-8")
    if len(ends := ends_of_text(contents.told)) > 1:  # of which config.json has the first
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")
    (folder / GGUF_INDEX).write_text(json.dumps(index_of(contents.places)), encoding="utf-8")


def _drop_added(file: Path, num_tokens: int) -> None:
    """Remove tokens that the GGUF file does not have: transformers adds the defaults of the tokenizer's class."""
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < num_tokens]
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _drop_those_of_nothing(folder: Path) -> None:
    """Remove the directories of GGUF files that no longer exist."""
    for other in folder.iterdir():
        if other.name[0] != "." and not (other / GGUF_FILE).exists():
            shutil.rmtree(other, ignore_errors=True)
