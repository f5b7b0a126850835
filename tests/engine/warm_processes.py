"""Python processes that need not import torch: forks of one that has, started as `subprocess.Popen` starts others.

Importing what an engine needs takes several seconds of a core, and a test that kills processes starts many. Those of
this module are children of the process that asks, as others are: they are waited for and killed as usual, and what
they start is forked likewise. Tests of how a process starts, or of what it imports, start theirs in earnest.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import inspect
import os
import pickle
import runpy
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

_SUBREAPER = 36
"""Linux' PR_SET_CHILD_SUBREAPER: what descendants leave behind becomes a child of the process that has said so."""
_MOST_BYTES = 1 << 17
_MOST_DESCRIPTORS = 32
_PARAMETERS = tuple(inspect.signature(subprocess.Popen._execute_child).parameters)[1:]  # type: ignore[attr-defined]
_FLAGS = ("-B", "-P", "-u")
"""Those of the interpreter that make no difference to a fork of one that has them."""
_SERVE = "import sys; sys.path[:] = {path!r}; import warm_processes; warm_processes.serve({line}, {imports!r})"


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a process is started with."""

    args: list[str]
    """Behind the interpreter: `-c program`, `-m module` or a file, and its arguments."""
    cwd: str
    environment: dict[str, str]
    descriptors: list[int]
    """What those that are sent with this are to be called there; the first three are the standard ones."""


class WarmProcesses:
    """What processes are forked from; a context manager, at whose end it ends."""

    def __init__(self, imports: str) -> None:
        """`imports` is the Python that it executes first."""
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = [str(Path(__file__).parent), *sys.path]
        program = _SERVE.format(path=path, line=theirs.fileno(), imports=imports)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-c", program], pass_fds=[theirs.fileno()], env=environment
            )

    def __enter__(self) -> WarmProcesses:
        return self

    def __exit__(self, *error: object) -> None:
        self._line.close()
        self._server.wait()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, Python programs that `subprocess` starts are forked."""
        before = subprocess.Popen
        _fork_from(self._line)
        try:
            yield
        finally:
            subprocess.Popen = before  # type: ignore[misc]


def _fork_from(line: socket.socket) -> None:
    """Let `subprocess` have Python programs forked by who listens at the other end of `line`."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    asking = threading.Lock()

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        """Other programs than Python's are started as ever, and so are processes with unusual wishes."""

        def _execute_child(self, *given: Any) -> None:
            wishes = dict(zip(_PARAMETERS, given, strict=True))
            program, *command = [os.fsdecode(each) for each in wishes["args"]]
            flags = list(takewhile(_FLAGS.__contains__, command))
            command = command[len(flags) :]
            is_known = program == sys.executable and (command[0] in ("-c", "-m") or command[0].endswith(".py"))
            if not is_known or wishes["preexec_fn"] is not None:
                super()._execute_child(*given)  # type: ignore[misc]
                return
            standard = enumerate((wishes["p2cread"], wishes["c2pwrite"], wishes["errwrite"]))
            passed = sorted(wishes["pass_fds"])
            start = Start(
                args=command,
                cwd=os.path.abspath(wishes["cwd"] or "."),
                environment=dict(os.environ if wishes["env"] is None else wishes["env"]),
                descriptors=[0, 1, 2, *passed],
            )
            with asking:
                sent = [number if descriptor == -1 else descriptor for number, descriptor in standard]
                socket.send_fds(line, [pickle.dumps(start)], [*sent, *passed])
                self.pid = int(line.recv(_MOST_BYTES))
            self._child_created = True
            pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
            self._close_pipe_fds(*(wishes[name] for name in pipes))  # type: ignore[attr-defined]

    subprocess.Popen = Popen  # type: ignore[misc]


def serve(number: int, imports: str) -> NoReturn:
    """Execute `imports`, then fork for each `Start` that comes over a descriptor."""
    exec(imports, {})
    gc.freeze()  # so that collecting garbage copies nothing of it in the forks
    _serve(socket.socket(fileno=number))


def _serve(line: socket.socket) -> NoReturn:
    while True:
        sent, descriptors, _, _ = socket.recv_fds(line, _MOST_BYTES, _MOST_DESCRIPTORS)
        if not sent:
            os._exit(0)  # who has asked is gone
        told, tell = os.pipe()
        if (between := os.fork()) == 0:
            parent = os.getpid()
            if child := os.fork():
                os.write(tell, str(child).encode())
                os._exit(0)  # its child becomes one of the process that has asked
            for each in (line.detach(), told, tell):
                os.close(each)
            while os.getppid() == parent:
                time.sleep(0.0005)
            _become(pickle.loads(sent), descriptors)
        os.waitpid(between, 0)
        line.send(os.read(told, 100))
        for each in (told, tell, *descriptors):
            os.close(each)


def _become(start: Start, descriptors: list[int]) -> NoReturn:
    """Be the process that is to be started."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:  # what is forked for the processes that this one starts
        for each in (ours.detach(), *descriptors):
            os.close(each)
        _serve(theirs)
    theirs.close()
    ours = socket.socket(fileno=fcntl.fcntl(ours.detach(), fcntl.F_DUPFD_CLOEXEC, 64))
    away = [fcntl.fcntl(each, fcntl.F_DUPFD, 64) for each in descriptors]  # beyond those that are asked for
    for each in descriptors:
        os.close(each)
    for each, number in zip(away, start.descriptors, strict=True):
        os.dup2(each, number)
        os.close(each)
    # The streams were made for other files, in which one could seek, perhaps, as one cannot in a pipe.
    with contextlib.suppress(OSError):
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - the process has it to its end
    with contextlib.suppress(OSError):
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(start.environment)
    os.chdir(start.cwd)
    _fork_from(ours)
    sys.path[:0] = [each for each in start.environment.get("PYTHONPATH", "").split(os.pathsep) if each]
    code = 0
    try:
        _execute(*start.args)
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
        if code == 1 and exit.code != 1:
            print(exit.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError):  # it is closed
            stream.flush()
    os._exit(code)  # taking an interpreter with all these modules apart takes seconds, too


def _execute(kind: str, *rest: str) -> None:
    """Run the program of a command line."""
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        sys.argv = ["-m", *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")
