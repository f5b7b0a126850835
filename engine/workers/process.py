"""A worker process: starting it, exchanging messages with it, and noticing its end."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import reduction
from multiprocessing.connection import Connection
from multiprocessing.spawn import get_executable
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError, named
from engine.planning.hardware import Memory
from engine.policy import Policy
from engine.workers.messages import Check, Checked, Close, Fault, Look, Open, Seen, Tells, Told

if TYPE_CHECKING:
    from engine.checkpoint.description import ModelDescription

PROGRAM = "engine.worker"
"""The module whose `main` the process runs."""
_LOOK_S = 0.5
"""Interval of checks whether the process is alive: a child may have inherited its pipe and keep it open."""
_HINTS = {
    signal.SIGKILL: ", as the system does where memory runs out",
    signal.SIGBUS: ", as the system does where a mapped file can no longer be read: weights that were cut short, or "
    "lie on a network drive that went away",
}
"""What a signal that ended the process may mean."""
_LAST_WORDS_S = 5.0
"""Time for a process that reported its end, or an error, to exit by itself."""


class WorkerProcess:
    """A new Python interpreter that runs `engine.worker`; it ends with its parent, however the parent ends.

    It is spawned, not forked, and imports nothing of the program that starts it: neither its main module nor HELM.
    """

    def __init__(self) -> None:
        """Start the process; it imports what it needs and waits for messages."""
        self._line, theirs = (_beyond_standard(line) for line in multiprocessing.Pipe())
        self._sending = threading.Lock()
        self._listener: threading.Thread | None = None
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; from engine.workers.plain import print_plain_text; "
            f"print_plain_text(); from {PROGRAM} import main; main({theirs.fileno()})"
        )
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        try:
            self._process = subprocess.Popen(
                [os.fsdecode(get_executable()), *flags, "-c", program],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,  # the process reads no input
                stdout=2 if _is_open(2) else subprocess.DEVNULL,  # what it prints is not output of the command
                stderr=None if _is_open(2) else subprocess.DEVNULL,
            )
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def look(self, policy: Policy) -> Seen:
        """Return the devices, and the memory that a run under `policy` may use; call it before `listen`.

        The calling process touches no device. Raises `EngineError` if the process has ended.
        """
        seen: Seen = self._answer(Look(policy=policy))
        return seen

    def check(self, description: ModelDescription, policy: Policy) -> None:
        """Check a model in the process like `engine.opening.check_model`; call it before `listen`.

        Raises what that raises, and `EngineError` if the process has ended.
        """
        checked: Checked = self._answer(Check(description=description, policy=policy))
        if checked.error is not None:
            raise checked.error

    def _answer(self, question: Look | Check) -> Any:
        self.send(question)
        try:
            told = self._line.recv()
        except (EOFError, OSError):
            self.kill()
            raise EngineError(f"the engine's process ended ({_described(self._process.returncode)})") from None
        if isinstance(told, Fault):  # it cannot even import what it needs
            raise told.error
        return told

    def memory(self, policy: Policy) -> Memory:
        """Return the memory a run under `policy` may use, as `look` finds it; raises the error if `look` found one."""
        found = self.look(policy).memory
        if isinstance(found, EngineError):
            raise found
        return found

    def listen(self, tell: Callable[[Tells], None], ended: Callable[[str], None]) -> None:
        """Pass each message to `tell`, and at last how the process ended to `ended`, in a new thread; call it once."""
        self._listener = threading.Thread(
            target=self._listen, args=(tell, ended), name=f"flexgen-worker-{self.pid}", daemon=True
        )
        self._listener.start()

    def send(self, message: Told) -> None:
        """Send a message; a message to a process that has ended is lost, and `listen` reports the end."""
        with self._sending, contextlib.suppress(OSError):
            self._line.send(message)
            if isinstance(message, Open) and message.member is not None and message.member.weights is not None:
                reduction.send_handle(self._line, message.member.weights, self.pid)

    def close(self) -> None:
        """Let the process end after the current sweep; returns when it has, and its messages were passed on."""
        self.send(Close())
        self.wait()

    def wait(self) -> None:
        """Return when the process has ended, and its messages were passed on."""
        self._process.wait()
        if self._listener is not None:
            self._listener.join()

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()

    def _listen(self, tell: Callable[[Tells], None], ended: Callable[[str], None]) -> None:
        line: Connection = self._line
        heard = ""
        try:
            while True:
                if line.poll(_LOOK_S):
                    tell(line.recv())
                elif self._process.poll() is not None and not line.poll():
                    break
        except (EOFError, OSError):
            pass
        except Exception as error:  # there is too little memory for what it says: none of it is heard any more
            heard = f"what it said could not be taken in: {named(error)}; "
            self.kill()
        try:
            self._process.wait(_LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            self.kill()
        with self._sending:
            line.close()
        ended(heard + _described(self._process.returncode))


def _is_open(descriptor: int) -> bool:
    """Whether this process has the descriptor open: a daemon may lack standard streams."""
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _beyond_standard(line: Connection) -> Connection:
    """Move `line` to a descriptor above the standard ones, which the new process uses for other purposes."""
    if line.fileno() > 2:
        return line
    with line:
        return Connection(fcntl.fcntl(line.fileno(), fcntl.F_DUPFD_CLOEXEC, 3))


def _described(code: int) -> str:
    """Describe how a process ended, from its exit code."""
    if code >= 0:
        return f"exit code {code}"
    try:
        known = signal.Signals(-code)
    except ValueError:
        return f"killed by signal {-code} (unknown)"
    return f"killed by signal {-code} ({known.name}){_HINTS.get(known, '')}"
