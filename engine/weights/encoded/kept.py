"""A cache of a checkpoint's encoded weights in the user's cache directory: written at the first start, then read."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import torch
import transformers

from engine.checkpoint.identity.result import NUMERICS_VERSION
from engine.checkpoint.identity.sampled import weights_state
from engine.errors import CheckpointError, EngineError
from engine.memory import accelerator
from engine.memory.paths import cache_directory, make_private, open_private
from engine.reading import read_json_object
from engine.weights.encoded.unit_file import PARTIAL, DamagedFileError, open_unit, write_unit
from engine.weights.read_ahead import Step
from engine.weights.store import WeightStore

_LAYOUT_VERSION = 2
"""The version of the directory and its files; raised whenever an older one must not be read."""
_MANIFEST = "manifest.json"
_MANIFEST_BYTES = 1 << 20
_USED_PART = 0.9
"""The share of the free disk space that may be used: runs usually write their results to the same disk."""
_WAIT_S = 0.05
"""How often a stage looks whether another one has written its layers."""
_CURE = "XDG_CACHE_HOME names another directory"

_log = logging.getLogger(__name__)


class _Stopped(Exception):
    """Raised when writing is of no use any more."""


class KeptWeights:
    """A directory with a file for each unit, and a manifest that says what they were made from.

    Its name is a digest of the manifest, so its content is never out of date. A file is there whole or not at all, and
    files are independent: a unit whose file is missing or damaged is encoded from the checkpoint and written, the
    others are read. So an interrupted start is continued by the next one. One process writes at a time, under a lock
    that ends with it; others do without, but stages of a model, which write their own layers one after the other. An
    error while writing is a notice only.

    A context manager around the iteration of steps: inside, a thread of its own writes completed units from the memory
    that holds them anyway, and leaving waits until all are written. If left by an exception, it writes no more.
    """

    def __init__(self, source: Path, weights: WeightStore, codes: int | str) -> None:
        """source: the model directory. codes: the policy's compress-weight. Raises no `OSError`."""
        self._weights = weights
        root = source.resolve()
        is_of_hub = root.parent.name == "snapshots"
        self.source = root.parent.parent if is_of_hub else root
        self.manifest: dict[str, Any] = {
            "source": str(self.source),
            "compress-weight": codes,
            "dtype": str(weights.model.dtype).removeprefix("torch."),
            "weights": weights_state(source),
            "transformers": transformers.__version__,
            "numerics": NUMERICS_VERSION,
            "layout": _LAYOUT_VERSION,
        }
        digest = hashlib.sha256(json.dumps(self.manifest).encode()).hexdigest()[:12]
        name = re.sub(r"[^\w.-]+", "-", self.source.name.removeprefix("models--"))[:80]
        form = codes if isinstance(codes, str) else f"{codes}bit"
        self.folder = weights_directory() / f"{name}-{form}-{self.manifest['dtype']}-{digest}"
        self._opened: dict[str, tuple[torch.Tensor, list[int]]] = {}
        self._complete: SimpleQueue[str | None] = SimpleQueue()
        self._stopping = self._has_told = False
        self._lock: int | None = None
        self._writer: threading.Thread | None = None
        self._written: list[Path] = []
        member = weights.member
        self._waits = weights.model.is_in_stages
        self._may_write = member is None or (member.index == 0 and not member.gather)
        _drop_superseded(self.folder, self.manifest)
        for name in weights.unit_names:
            self._open(name)

    def steps(self, name: str, own: list[Step]) -> Iterator[Step]:
        """The loading steps of unit `name`: reading its file where there is one, else `own` steps, then writing it.

        With several engines that share the weights, the first one writes, and gathered units are not written, since no
        engine has all bytes of a layer.
        """
        if name not in self._opened:
            yield from own
            yield Step(lambda: self._complete.put(name), [])
            return
        tensor, sums = self._opened.pop(name)

        def reject() -> None:
            self._tell_bad(name, "it is damaged")
            for step in own:
                step.act()
            self._complete.put(name)

        yield Step(lambda: self._weights.put_unit(name, tensor), [tensor], sums=sums, reject=reject)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _open(self, name: str) -> None:
        try:
            self._opened[name] = open_unit(self._file(name), *self._weights.stored_form(name))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (DamagedFileError, OSError) as error:
            self._tell_bad(name, getattr(error, "strerror", None) or "it is damaged")

    def _tell_bad(self, name: str, why: str) -> None:
        """Log the first file that cannot be used; where one is bad, many may be."""
        if not self._has_told:
            _notice(f"cannot use encoded weights {self._file(name)}: {why}; encoding the bad ones again")
        self._has_told = True

    def __enter__(self) -> KeptWeights:
        self._missing = [name for name in self._weights.unit_names if name not in self._opened]
        self._writer = threading.Thread(target=self._write, name="flexgen-keep", daemon=True)
        self._writer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._writer is not None
        self._stopping = kind is not None
        self._complete.put(None)
        self._writer.join()

    def _write(self) -> None:
        """Write each unit when it is complete."""
        device = self._weights.model.device
        stream = accelerator.new_stream(device)
        names = iter(self._complete.get, None)
        try:
            first = next(names, None)
            if first is None or not self._may_write or not self._claim():
                return
            with accelerator.on_stream(stream, device) if stream is not None else nullcontext():
                for name in chain([first], names):
                    self._write_unit(name)
        except (_Stopped, EngineError):  # of an engine whose loading has ended, who loads it tells
            pass
        except OSError as error:
            self._undo()
            _notice(f"encoded weights are not kept in {self.folder}: {error.strerror or error}; {_CURE}")
        finally:
            if self._lock is not None:
                os.close(self._lock)

    def _write_unit(self, name: str) -> None:
        for _ in self._weights.arrivals.until_complete(name):  # another process may put it in place
            if self._stopping:
                raise _Stopped

        def read(first: int, end: int) -> torch.Tensor:
            if self._stopping:
                raise _Stopped
            return self._weights.stored_bytes(name, first, end)

        layout, num_bytes = self._weights.stored_form(name)
        if self._file(name).is_dir():  # which no file can replace; one that holds something is left to its owner
            self._file(name).rmdir()
        write_unit(self._file(name), layout, num_bytes, read)
        self._written.append(self._file(name))

    def _claim(self) -> bool:
        """Prepare the directory for this process to write to; False where another one writes."""
        make_private(self.folder)
        while (lock := _locked(self.folder)) is None:
            if not self._waits or self._stopping:
                return False
            time.sleep(_WAIT_S)
        self._lock = lock
        for left in self.folder.glob(PARTIAL):
            left.unlink()
        needed = sum(self._weights.stored_form(name)[1] for name in self._missing)
        free = shutil.disk_usage(self.folder).free
        if needed > free * _USED_PART:
            raise OSError(f"they take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
        manifest = self.folder / _MANIFEST
        if not self._is_told_by(manifest):
            partial = self.folder / f".{_MANIFEST}.partial"
            with open(partial, "w", encoding="utf-8", opener=open_private) as stream:
                stream.write(json.dumps(self.manifest, indent=2) + "\n")
            os.replace(partial, manifest)
        return True

    def _is_told_by(self, manifest: Path) -> bool:
        """Whether the manifest file has the expected content; a damaged one is written again."""
        try:
            return read_json_object(manifest, CheckpointError, limit=_MANIFEST_BYTES) == self.manifest
        except CheckpointError:
            return False

    def _undo(self) -> None:
        """Remove what this process wrote, and the directory unless it contains files of others."""
        for file in self._written:
            file.unlink(missing_ok=True)
        if not any(self.folder.glob("*.safetensors")):
            shutil.rmtree(self.folder, ignore_errors=True)


def weights_directory() -> Path:
    """The directory of encoded weights, with one directory for each checkpoint, codec and dtype."""
    return cache_directory() / "weights"


def _drop_superseded(folder: Path, manifest: dict[str, Any]) -> None:
    """Remove cached weights of the same source and form that other contents or other versions made."""
    for found in weights_directory().glob(f"*/{_MANIFEST}"):
        try:
            other = read_json_object(found, CheckpointError, limit=_MANIFEST_BYTES)
            same = all(other[key] == manifest[key] for key in ("source", "compress-weight", "dtype"))
            if not same or found.parent == folder:
                continue
            lock = _locked(found.parent)
            if lock is None:
                continue
            shutil.rmtree(found.parent)
            os.close(lock)
            why = "changed" if other["weights"] != manifest["weights"] else "were encoded by other versions"
            _notice(f"weights of {manifest['source']} {why} since they were kept; encoding them again")
        except (CheckpointError, OSError, KeyError):
            continue  # not ours, or not ours to remove


def _locked(folder: Path) -> int | None:
    """A handle that locks a directory until it is closed or the process ends; None if another process has the lock."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(folder)):  # else removed, and made anew, meanwhile
            return handle
    except BlockingIOError:
        pass
    except OSError:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _notice(text: str) -> None:
    _log.warning("flexgen-helm: %s", text)
