"""Finds a model: a directory, or a repository of the hub, of which only the model's files are downloaded."""

from __future__ import annotations

import errno
import glob
import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from engine.checkpoint.adapters.declared import ADAPTER_WEIGHTS
from engine.checkpoint.weight_files import CHOICES, named_weights, weight_files, weight_map
from engine.errors import CheckpointError, ConfigError, named, one_line, shown
from engine.reading import expand_home, find_file

_ANSWER_S = 10.0
"""The longest wait for the hub's list of a repository's files."""
_NAMES_S = 20.0
"""The same with name resolution, which has no time limit of its own."""
DEFAULT_REVISION = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SIDE_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_OF_THE_DISK = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EIO, errno.ESTALE)
}
_TEMPLATES = "additional_chat_templates/"

_log = logging.getLogger(__name__)


def split_revision(model: str) -> tuple[str, str | None]:
    """The repository of a hub id such as `org/model@revision`, and its revision (a branch, tag or commit), if any.

    Raises `CheckpointError` where nothing follows the @.
    """
    repository, at, revision = model.partition("@")
    if at and not revision:
        raise CheckpointError(f"model {shown(model)} ends with @; write a branch, a tag or a commit after it")
    return repository, revision or None


def with_revision(model: str, revision: str | None) -> str:
    """The hub id of a model at a revision; `main`, the revision of hub ids without one, changes nothing.

    Raises `ConfigError` for a directory, and for an id that names another revision itself.
    """
    if revision is None or revision == DEFAULT_REVISION:
        return model
    repository, named = split_revision(model)
    if Path(model).expanduser().exists() or (named is not None and named != revision):
        what = "is a path" if named is None else f"names revision {named!r} itself"
        raise ConfigError(f"revision {revision!r}: model {shown(model)} {what}; leave revision out")
    return f"{repository}@{revision}"


def commit_of(path: Path) -> str | None:
    """The commit of a model's directory in the hub's cache; None for any other directory."""
    return path.name if path.parent.name == "snapshots" and _COMMIT.fullmatch(path.name) else None


def resolve(model: str, *, download_weights: bool = True) -> Path:
    """Return the local directory of `model`, a directory or a hub id (downloaded on first use).

    A hub id may name a revision: `org/model@revision`.
    """
    path = expand_home(model, CheckpointError, "model")
    try:
        if path.is_dir():
            return path
        is_something = path.exists()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"model {shown(model)} cannot be looked up: {one_line(error)}") from None
    if is_something:
        raise CheckpointError(f"model {model!r} is a file; name the directory that holds config.json and the weights")
    if str(model).startswith((".", "/", "~")) or split_revision(str(model))[0].count("/") != 1:
        raise CheckpointError(f"model directory {_whole(model)} does not exist")
    return _from_hub(model, weights=download_weights)


def _whole(model: str) -> str:
    return repr(model) if len(model) < 500 else shown(model)


def _from_hub(model: str, *, weights: bool) -> Path:
    """The model's directory in the hub's cache, updated if the hub answers."""
    from huggingface_hub import HfApi, constants, snapshot_download

    repository, revision = split_revision(model)
    cached = _cached(repository, revision)
    if constants.HF_HUB_OFFLINE:
        keeps = "HF_HUB_OFFLINE keeps it from being fetched"
        if cached is None:
            raise CheckpointError(
                f"model {model!r} is neither a directory nor in the local hub cache {constants.HF_HUB_CACHE}, and "
                f"{keeps}; name a directory, or unset HF_HUB_OFFLINE"
            )
        return _whole_in_cache(model, cached, f"{keeps}; unset HF_HUB_OFFLINE") if weights else cached
    try:
        info = _in_time(lambda: HfApi().model_info(repository, revision=revision, timeout=_ANSWER_S))
        names = [each.rfilename for each in info.siblings or ()]
        side = _side_files(names)
        path = Path(snapshot_download(repository, revision=revision, allow_patterns=_patterns(side)))
        if not weights:
            return path
        chosen = [*side, *_weight_names(path, names)]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_patterns(chosen)))
    except CheckpointError:
        raise
    except Exception as error:  # of the hub's client, of what carries it, and of an answer that is none
        why = _why(model, error)
        if cached is None:
            raise CheckpointError(why) from None
        path = _whole_in_cache(model, cached, why) if weights else cached
        _log.warning("flexgen-helm: %s; using the files in the local hub cache", why)
        return path


def _cached(repository: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download

    config = ["config.json"]
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=config))
    except (OSError, ValueError):  # not there, or not whole
        return None


def _whole_in_cache(model: str, cached: Path, why: str) -> Path:
    """Return `cached`; `CheckpointError` if weights are missing, which ends with `why` they are not downloaded."""
    if not _is_adapter([file.name for file in cached.iterdir()]):
        try:
            weight_files(cached)
        except CheckpointError as error:
            part = str(error).removesuffix("; fetch it again")
            raise CheckpointError(
                f"the local hub cache has model {model!r} only in part ({part}), the rest: {why}"
            ) from None
    return cached


def _in_time(ask: Callable[[], Any]) -> Any:
    """The result of `ask`, or its exception; `TimeoutError` when it takes longer than its own time limits allow."""
    answers: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            answers.put((ask(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, name="flexgen-hub", daemon=True).start()
    try:
        answer, error = answers.get(timeout=_NAMES_S)
    except Exception:  # queue.Empty
        raise TimeoutError(f"no answer within {_NAMES_S:.0f} s") from None
    if error is not None:
        raise error
    return answer


def _is_side_file(name: str) -> bool:
    """Whether it is a small file of the model itself: config, tokenizer, templates, weight indices."""
    return name.endswith(_SIDE_SUFFIXES) and ("/" not in name or name.startswith(_TEMPLATES))


def _side_files(names: list[str]) -> list[str]:
    """The files among a repository's `names` that are always downloaded.

    An adapter's weights are among them: they are small compared with its base model's, and show which base model fits.
    """
    return [*filter(_is_side_file, names), *([ADAPTER_WEIGHTS] if _is_adapter(names) else [])]


def _is_adapter(names: list[str]) -> bool:
    return "config.json" not in names and ADAPTER_WEIGHTS in names


def _weight_names(path: Path, names: list[str]) -> list[str]:
    """The weight files among a repository's `names` that `transformers` loads; `path` has its small files."""
    if _is_adapter(names):
        return []
    chosen = named_weights(path) or next((name for name in CHOICES if name in names), None)
    if chosen is None or not chosen.endswith(".index.json"):
        return [chosen] if chosen else []
    return sorted(set(weight_map(path / chosen).values())) if find_file(path / chosen, CheckpointError) else []


def _patterns(names: list[str]) -> list[str]:
    """Patterns for the hub's client that match exactly these names."""
    return [glob.escape(name) for name in names]


def _why(model: str, error: Exception) -> str:
    """One line on why the hub does not provide `model`, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return f"model {shown(model)} is neither a directory nor a hub id: {one_line(error)}"
    hub, (repository, revision) = constants.ENDPOINT, split_revision(model)
    login = "log in with `hf auth login` or set HF_TOKEN"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError):
        return f"model {model!r} is gated: accept its terms at {hub}/{repository}, and {login}"
    if isinstance(error, DisabledRepoError):
        return f"model {model!r} is disabled by the hub {hub}"
    if isinstance(error, RevisionNotFoundError):
        return f"model {repository!r} has no revision {revision!r} on the hub {hub}; name a branch, a tag or a commit"
    if isinstance(error, RepositoryNotFoundError) and status != 403:
        return f"model {model!r} is no directory, and not on the hub {hub}; if it is private there, {login}"
    if status in (401, 403):
        return f"the hub {hub} does not allow you to read model {model!r} (HTTP {status}); {login}"
    if status is not None:
        return f"the hub {hub} answers HTTP {status} for model {model!r}; try again later, or name a directory"
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        where = error.filename or constants.HF_HUB_CACHE
        return (
            f"model {model!r} cannot be written to the hub cache: {where}: {error.strerror}; HF_HUB_CACHE names another"
        )
    if isinstance(error, ValueError | KeyError | TypeError | AttributeError | AssertionError):
        return (
            f"the hub {hub} answers for model {model!r} in an unknown way ("
            f"{named(error)}); check HF_ENDPOINT, and whether a proxy asks to log in"
        )
    if isinstance(error, RuntimeError) or type(error).__name__ == "XetDownloadError":  # hf_xet raises both
        return (
            f"files of model {model!r} cannot be fetched from the Xet storage of the hub {hub} ({named(error)}); try "
            "again later, or fetch them another way with HF_HUB_DISABLE_XET=1"
        )
    return (
        f"model {model!r} is no directory, and the hub {hub} cannot be reached ("
        f"{named(error)}); name a directory, or download it where there is a network"
    )
