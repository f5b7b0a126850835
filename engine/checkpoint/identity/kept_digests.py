"""Digests of weight files in the user's cache directory; each is valid while its file is unchanged."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.memory.paths import cache_directory
from engine.memory.replaced import replace_text
from engine.reading import read_json_object

_LAYOUT_VERSION = 1
"""The version of the file and of the way digests are made; raised whenever an older file must not be read."""
_MOST_BYTES = 64 << 20
SETTLED_NS = 2_000_000_000
"""The least age of a file's last change, in ns, when it is opened to be read: a file system's clock may tick as slowly
as this, and a change within the same tick would not show."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileState:
    """The metadata that shows, without reading a file, whether it is the one that was read, unchanged."""

    size: int
    """Size in bytes."""
    modified_ns: int
    """Time of the last write, in ns since the Epoch."""
    changed_ns: int
    """Time of the last change of content or inode (ctime); unlike the time of the last write, programs cannot set it
    back."""
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        """The state of an opened file, or of a file by name."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    def is_settled(self, now_ns: int) -> bool:
        """Whether a change after `now_ns`, in ns since the Epoch, would change the times for certain."""
        return max(self.modified_ns, self.changed_ns) + SETTLED_NS <= now_ns


Kept = dict[str, tuple[FileState, str]]
"""The state and hex digest of each weight file, by its name in the model directory."""


class KeptDigests:
    """The digests of a model directory's weight files, in one JSON file with a checksum.

    A file that is missing, damaged, of another version or of another directory counts as empty. An error while writing
    it is a notice only.
    """

    def __init__(self, path: Path) -> None:
        """path: the model directory."""
        self._source = str(path.resolve())
        name = re.sub(r"[^\w.-]+", "-", path.resolve().name)[:80]
        self.file = digests_directory() / f"{name}-{hashlib.sha256(os.fsencode(self._source)).hexdigest()[:16]}.json"

    def read(self) -> Kept:
        """Read the stored digests, whether or not their files are unchanged."""
        try:
            content = read_json_object(self.file, CheckpointError, limit=_MOST_BYTES)
            checksum = content.pop("checksum")
            if checksum != _checksum(content) or content["layout"] != _LAYOUT_VERSION:
                return {}
            if content["source"] != self._source:
                return {}
            return {
                name: (FileState(*(int(entry[key]) for key in _STATE_KEYS)), str(entry["digest"]))
                for name, entry in content["files"].items()
            }
        except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):
            return {}

    def write(self, kept: Kept) -> None:
        """Replace the stored digests by these, atomically."""
        files = {
            name: {**dict(zip(_STATE_KEYS, _numbers(state), strict=True)), "digest": digest}
            for name, (state, digest) in kept.items()
        }
        content: dict[str, Any] = {"layout": _LAYOUT_VERSION, "source": self._source, "files": files}
        text = json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.file, text)
            self._drop_those_of_nothing()
        except OSError as error:
            _log.warning(
                "flexgen-helm: the digest of %s is not kept in %s: %s; the next start reads all weight files for it "
                "again; XDG_CACHE_HOME names another directory",
                self._source,
                self.file.parent,
                error.strerror or error,
            )

    def _drop_those_of_nothing(self) -> None:
        """Remove the digests of model directories that no longer exist."""
        for other in self.file.parent.glob("*.json"):
            with suppress(CheckpointError, KeyError, TypeError, ValueError, OSError):
                if not Path(read_json_object(other, CheckpointError, limit=_MOST_BYTES)["source"]).exists():
                    other.unlink()


_STATE_KEYS = ("size", "modified_ns", "changed_ns", "inode")


def _numbers(state: FileState) -> tuple[int, int, int, int]:
    return state.size, state.modified_ns, state.changed_ns, state.inode


def digests_directory() -> Path:
    """The directory of stored digests, one file for each model directory."""
    return cache_directory() / "digests"


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
