"""The digest of every byte of a model's weight files, computed by threads while the files are read for loading."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

from engine.checkpoint.identity.kept_digests import FileState, KeptDigests
from engine.checkpoint.opened_weights import OpenedWeights
from engine.errors import CheckpointError, EngineError, one_line
from engine.memory.cores import usable_cores

LEAF_BYTES = 8 << 20
"""The bytes that are read and digested at once, in any order; part of the definition of the digest. It is large,
because a thread of low priority that waits for a core may hold the interpreter between two calls."""
_MOST_THREADS = 8
_NICENESS = 5


@dataclass(eq=False)
class _File:
    """A weight file whose digest is not known yet."""

    path: Path
    name: str
    """Its name in the model directory."""
    handle: int
    state: FileState
    """Its state when it was opened."""
    is_settled: bool
    leaves: list[bytes] = field(default_factory=list)
    left: set[int] = field(default_factory=set)
    """The leaves that no thread has been assigned yet."""

    @property
    def num_leaves(self) -> int:
        return -(-self.state.size // LEAF_BYTES)

    def digest(self) -> str:
        """The digest of the leaves' digests, in order, and of the size."""
        return hashlib.sha256(b"%d\0" % self.state.size + b"".join(self.leaves)).hexdigest()


class WeightDigest:
    """SHA-256 over the names of a model's weight files and the digests of their leaves of `LEAF_BYTES`.

    Files that are unchanged since their digest was stored are not read. Threads read and digest the leaves of the
    others: first those that `follow` names, which are in the page cache then, and the rest at `finish`. One thread
    calls `follow` and `finish`; any may `wait`. Digests are stored for the next start.
    """

    def __init__(self, path: Path, source: OpenedWeights) -> None:
        """path: the model directory, whose weight files `source` holds open."""
        self._kept = KeptDigests(path)
        kept, now = self._kept.read(), time.time_ns()
        self._known: dict[str, str] = {}
        self._states: dict[str, FileState] = {}
        self._files: dict[Path, _File] = {}
        for file, handle in source.duplicates():
            name, state = file.relative_to(path).as_posix(), FileState.of(os.fstat(handle))
            self._states[name] = state
            if name in kept and kept[name][0] == state:
                self._known[name] = kept[name][1]
                os.close(handle)
            else:
                found = _File(file, name, handle, state, state.is_settled(now))
                found.leaves, found.left = [b""] * found.num_leaves, set(range(found.num_leaves))
                self._files[file] = found
        self._num_left = sum(file.num_leaves for file in self._files.values())
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._fault: BaseException | None = None
        self._todo: SimpleQueue[tuple[_File, int] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._digest = ""
        if not self._num_left:
            self._complete()

    @property
    def is_known(self) -> bool:
        """Whether `wait` returns at once."""
        return self._ended.is_set()

    def follow(self, file: Path, first: int, end: int) -> None:
        """Digest the leaves of `file` that contain bytes `first` to `end`, which have just been read."""
        found = self._files.get(file)
        if found is not None:
            self._tell(found, sorted(found.left.intersection(range(first // LEAF_BYTES, -(-end // LEAF_BYTES)))))

    def finish(self) -> None:
        """Digest all remaining leaves."""
        for found in self._files.values():
            self._tell(found, sorted(found.left))

    def wait(self) -> str:
        """Wait until `finish` was called and everything is read; return the hex digest.

        Raises `CheckpointError` if a file was written to meanwhile or cannot be read, `EngineError` if the digest was
        closed, and the fault passed to `give_up`.
        """
        self._ended.wait()
        if self._fault is not None:
            raise self._fault
        return self._digest

    def give_up(self, fault: BaseException) -> None:
        """Stop reading; `wait` raises `fault` while the digest is incomplete."""
        self._end(fault)

    def close(self) -> None:
        """End the threads; `wait` raises an `EngineError` while the digest is incomplete."""
        self.give_up(
            EngineError("the engine was closed before all weight files were read, so their digest is not known")
        )
        for thread in self._threads:
            thread.join()
        for found in self._files.values():
            os.close(found.handle)
        self._files.clear()

    def _tell(self, found: _File, leaves: list[int]) -> None:
        if self._ended.is_set() or not leaves:
            return
        if not self._threads:
            count = min(_MOST_THREADS, max(1, usable_cores() // 2), self._num_left)
            self._threads = [
                threading.Thread(target=self._run, name="flexgen-digest", daemon=True) for _ in range(count)
            ]
            for thread in self._threads:
                thread.start()
        found.left.difference_update(leaves)
        for leaf in leaves:
            self._todo.put((found, leaf))

    def _run(self) -> None:
        if sys.platform == "linux":  # where few cores are free, they are the loading's
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        memory = memoryview(bytearray(LEAF_BYTES))
        for found, leaf in iter(self._todo.get, None):
            if self._ended.is_set():
                return
            try:
                digest = self._leaf(found, leaf, memory)
                with self._lock:
                    if self._ended.is_set():
                        return  # the leaf may not have been read to its end
                    found.leaves[leaf] = digest
                    self._num_left -= 1
                    is_last = not self._num_left
                if is_last:
                    self._complete()
            except EngineError as error:
                self._end(error)
            except OSError as error:
                self._end(CheckpointError(f"{found.path} cannot be read: {error.strerror or one_line(error)}"))
            except BaseException as error:
                self._end(EngineError(f"the digest of {found.path} failed: {one_line(error)}"))

    def _leaf(self, found: _File, leaf: int, memory: memoryview) -> bytes:
        digest = hashlib.sha256()
        at, end = leaf * LEAF_BYTES, min(found.state.size, (leaf + 1) * LEAF_BYTES)
        while at < end and not self._ended.is_set():
            count = os.preadv(found.handle, [memory[: end - at]], at)
            if not count:
                raise CheckpointError(f"{found.path} was cut short while it was read; start again")
            digest.update(memory[:count])
            at += count
        return digest.digest()

    def _complete(self) -> None:
        """Combine the leaves' digests, unless a file has been written to since it was opened, and store the result."""
        for found in self._files.values():
            if FileState.of(os.fstat(found.handle)) != found.state:
                raise CheckpointError(
                    f"{found.path} was written to while its digest was computed; start again when nothing writes there "
                    "any more"
                )
            self._known[found.name] = found.digest()
        whole = [[name, self._states[name].size, self._known[name]] for name in sorted(self._known)]
        self._digest = hashlib.sha256(json.dumps(whole).encode()).hexdigest()
        if self._files and not self._ended.is_set():
            unsettled = {found.name for found in self._files.values() if not found.is_settled}
            self._kept.write(
                {name: (self._states[name], self._known[name]) for name in self._known if name not in unsettled}
            )
        self._end(None)

    def _end(self, fault: BaseException | None) -> None:
        with self._lock:
            if self._ended.is_set():
                return
            self._fault = fault
            self._ended.set()
        for _ in self._threads:
            self._todo.put(None)


def weights_digest(path: Path, source: OpenedWeights) -> str:
    """The `WeightDigest` of a model directory: immediately where it is stored, else after reading all opened files."""
    digest = WeightDigest(path, source)
    try:
        digest.finish()
        return digest.wait()
    finally:
        digest.close()
