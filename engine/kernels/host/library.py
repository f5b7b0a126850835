"""Compiles C sources for this processor, caches the library, and runs its functions on torch's own threads."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from engine.memory.paths import cache_directory, make_private

_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_SECONDS = 60
FAILURES = (OSError, ValueError, AttributeError, subprocess.SubprocessError)
"""The exceptions of `compiled`, of opening its result, and of `on_torch_threads` where such functions are not
available.

There is no compiler or it fails (ValueError: CC holds no command), or torch's threads are not GNU OpenMP's."""


def compiled(name: str, sources: Sequence[Path], headers: Sequence[Path] = ()) -> Path:
    """The shared library of `sources`, cached under `name` and a digest of what it depends on.

    It is compiled again where the cached file is damaged: calling into half a file would end the process.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or [_compiler()]
    texts = [file.read_bytes() for file in (*sources, *headers)]
    parts = [*texts, " ".join([*compiler, *_FLAGS, platform.machine(), _cpu_flags()]).encode()]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    path = cache_directory() / f"{name}-{key}.so"
    digest = path.with_suffix(".sha256")
    make_private(path.parent)
    status = path.parent.stat()
    if status.st_mode & 0o022 or status.st_uid not in (0, os.geteuid()):
        raise PermissionError(f"{path.parent} is writable by others, so code from there is not run")
    if path.is_file() and digest.is_file() and digest.read_text("ascii", "replace") == _digest_of(path):
        return path
    _drop_what_was_killed(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="compile-") as folder:
        made = Path(folder) / path.name
        command = [*compiler, *_FLAGS, *map(str, sources), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
        written = Path(folder) / digest.name
        written.write_text(_digest_of(made), "ascii")
        made.replace(path)
        written.replace(digest)
    return path


def _drop_what_was_killed(folder: Path) -> None:
    """Remove what processes that were killed while they compiled have left: nobody compiles for so long."""
    for left in folder.glob("compile-*"):
        with contextlib.suppress(OSError):  # its owner has ended by now
            if time.time() - left.stat().st_mtime > 10 * _SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def reason_of(error: BaseException) -> str:
    """The reason of one of `FAILURES`, in one line."""
    return " ".join(str(getattr(error, "stderr", None) or error).split())[:300]


@cache
def on_torch_threads() -> Any:
    """A function that runs a C function of one pointer on several threads: `(function, pointer, threads, 0)`.

    It is the entry point of torch's own parallel loops (GNU OpenMP's, whose name other libraries export, too). Threads
    of our own would compete for cores with torch's, which wait for more work by spinning.
    """
    start = ctypes.CDLL(None).GOMP_parallel
    start.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    start.restype = None
    return start


def run(function: Any, work: ctypes.Structure, threads: int) -> None:
    """Call a C function of one pointer with `work`, on so many threads."""
    on_torch_threads()(ctypes.cast(function, ctypes.c_void_p), ctypes.addressof(work), threads, 0)


def _compiler() -> str:
    found = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if found is None:
        raise OSError("there is no C compiler (cc, gcc or clang)")
    return found


def _cpu_flags() -> str:
    """The processor's features, where the system reports them: a home directory may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
