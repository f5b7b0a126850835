"""A process that runs an engine: started, spoken to, and known to have ended."""

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
"""The module whose `main` such a process runs."""
_LOOK_S = 0.5
"""How often it is looked whether the process is still there: who has inherited its end of the line may keep it open."""
_HINTS = {
    signal.SIGKILL: ", as the system does where memory runs out",
    signal.SIGBUS: ", as the system does where a mapped file can no longer be read: weights that were cut short, or "
    "lie on a network drive that went away",
}
"""What a signal that ended a process may mean."""
_LAST_WORDS_S = 5.0
"""For a process that has said it is done, or cannot go on, to end by itself."""


class WorkerProcess:
    """An interpreter of its own that runs `engine.worker`; it ends with its parent, whatever becomes of that.

    It is started anew, not forked, and imports nothing of the program that starts it: neither its main module nor HELM.
    """

    def __init__(self) -> None:
        """Start it; it imports what it needs, and waits."""
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
                stdin=subprocess.DEVNULL,  # nobody is asked anything
                stdout=2 if _is_open(2) else subprocess.DEVNULL,  # what it may print is no output of the command
                stderr=None if _is_open(2) else subprocess.DEVNULL,
            )
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        """The number that the system knows it by."""
        return self._process.pid

    def look(self, policy: Policy) -> Seen:
        """What devices there are, and what memory a run under `policy` may use; before it listens and opens a model.

        The process that asks touches no device for it. Raises `EngineError` when the process has ended.
        """
        seen: Seen = self._answer(Look(policy=policy))
        return seen

    def check(self, description: ModelDescription, policy: Policy) -> None:
        """Check a model there as `engine.opening.check_model` does; before it listens and opens a model.

        Raises what that raises, and `EngineError` when the process has ended.
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
        """What memory a run under `policy` may use, as `look` finds it; raises what keeps it from being known."""
        found = self.look(policy).memory
        if isinstance(found, EngineError):
            raise found
        return found

    def listen(self, tell: Callable[[Tells], None], ended: Callable[[str], None]) -> None:
        """From now on tell each message, and at last how the process ended, in a thread of its own; call it once."""
        self._listener = threading.Thread(
            target=self._listen, args=(tell, ended), name=f"flexgen-worker-{self.pid}", daemon=True
        )
        self._listener.start()

    def send(self, message: Told) -> None:
        """Say something; what is said to a process that has ended is lost, as `listen` tells."""
        with self._sending, contextlib.suppress(OSError):
            self._line.send(message)
            if isinstance(message, Open) and message.member is not None and message.member.weights is not None:
                reduction.send_handle(self._line, message.member.weights, self.pid)

    def close(self) -> None:
        """Let it end after the sweep at hand; returns when it has, and all that it said was told."""
        self.send(Close())
        self.wait()

    def wait(self) -> None:
        """Return when it has ended, and all that it said was told."""
        self._process.wait()
        if self._listener is not None:
            self._listener.join()

    def kill(self) -> None:
        """End it at once."""
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
    """Whether the program that starts a process has this descriptor: a daemon may have none of the standard ones."""
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _beyond_standard(line: Connection) -> Connection:
    """`line`, by a descriptor that is none of the standard ones: the process that is started has others for those."""
    if line.fileno() > 2:
        return line
    with line:
        return Connection(fcntl.fcntl(line.fileno(), fcntl.F_DUPFD_CLOEXEC, 3))


def _described(code: int) -> str:
    """How a process ended, by its exit code."""
    if code >= 0:
        return f"exit code {code}"
    try:
        known = signal.Signals(-code)
    except ValueError:
        return f"killed by signal {-code} (unknown)"
    return f"killed by signal {-code} ({known.name}){_HINTS.get(known, '')}"
