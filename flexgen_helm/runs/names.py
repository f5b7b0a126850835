"""Checks names of suites, runs and models, which become names of directories, before anything is computed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from engine.checkpoint.hub import split_revision
from engine.errors import ConfigError
from flexgen_helm.helm.scratch import SCRATCH

_LONGEST_NAME = 255
"""In bytes, for all common file systems."""


def check_suite_name(name: str) -> None:
    """Raise `ConfigError` for a suite name that is no valid directory next to the other suites."""
    if not name:
        raise ConfigError("name the suite with --suite")
    if Path(name).name != name or "\\" in name or name in (".", "..") or not name.isprintable():
        raise ConfigError(
            f"suite {name!r} is no name of a directory; leave separators and what cannot be printed out of it"
        )
    if name.endswith(SCRATCH):
        raise ConfigError(f"suite {name!r} ends like the directory in which sweeps prepare files; leave {SCRATCH} out")
    most = _LONGEST_NAME - len(SCRATCH)
    if len(os.fsencode(name)) > most:
        raise ConfigError(f"the suite's name has {len(os.fsencode(name))} bytes; take one of at most {most}")


def check_run_names(names: Iterable[str]) -> None:
    """Raise `ConfigError` for a run whose directory's name no file system can hold."""
    for name in names:
        size = len(os.fsencode(name))
        if size > _LONGEST_NAME:
            raise ConfigError(
                f"the name of run {name[:60]}... has {size} bytes and a directory's at most {_LONGEST_NAME}; the "
                "model's is in it twice: `flexgen-helm register --name` gives it a shorter one, or rename its directory"
            )


def check_one_file_system(suite_path: Path) -> None:
    """Raise `ConfigError` if a suite's directory is on another file system than the scratch directory next to it."""
    beside = suite_path.parent
    if suite_path.exists() and os.stat(suite_path).st_dev != os.stat(beside).st_dev:
        raise ConfigError(
            f"{suite_path} is on another file system than {beside}, from which finished runs are moved into it; "
            "remove the link and name a directory on that file system with -o"
        )


def checked_model_name(name: str) -> str:
    """HELM's name of a model as it is given; `ConfigError` for one that HELM could not read in a run's entry."""
    if not re.fullmatch(r"[^/\s,:=]+/[^/\s,:=]+", name):
        raise ConfigError(f"HELM model name {name!r} is not of the form organization/model, e.g. local/my-model")
    return name


def default_model_name(source: str, *, is_local: bool) -> str:
    """HELM's name of a model by its hub id, with its revision if it names one, or by its directory or file."""
    if is_local or "/" not in source:
        return f"local/{_plain(os.path.basename(source).removesuffix('.gguf')) or 'model'}"
    repository, revision = split_revision(source)
    return repository if revision is None else f"{repository}@{_plain(revision)}"


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


def tokenizer_args(tokenizer: str) -> dict[str, str]:
    """The arguments of HELM's tokenizers for a tokenizer in a directory (absolute) or of a hub id."""
    source, revision = (tokenizer, None) if os.path.isabs(tokenizer) else split_revision(tokenizer)
    return {"pretrained_model_name_or_path": source, **({} if revision is None else {"revision": revision})}
