"""The errors that the engine raises on purpose; each message is one line that says what, where and what to do.

* EngineError
  x ConfigError        a policy, flag or argument that is invalid
  x CheckpointError    a model directory that is missing, incomplete or damaged
  x UnsupportedError   a model or feature this engine does not run
  x CapacityError      the request does not fit into the available memory
  x InstallationError  the installation or the machine is not usable (wrong packages, no such device)
  x JobError           one job is bad; only that job fails
    x NumericsError    the model's logits for it are not finite
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class EngineError(Exception):
    """The base of all errors of the engine; `str()` of it is one line for the user."""


class ConfigError(EngineError):
    """A policy, flag or argument is invalid."""


class CheckpointError(EngineError):
    """A model directory is missing, incomplete or damaged."""


class UnsupportedError(EngineError):
    """The engine does not run this model or feature."""


class CapacityError(EngineError):
    """The request does not fit into the available memory."""


class InstallationError(EngineError):
    """The installation or the machine is not usable: wrong packages, no such device."""


class JobError(EngineError):
    """One job is bad (empty, too long, ...); only that job fails."""


class NumericsError(JobError):
    """The model's logits for one job are not finite; only that job fails."""


def did_you_mean(word: str, known: Iterable[str], alike: float = 0.5) -> str:
    """Return `; did you mean 'x'?` for the nearest of `known`, or the sorted list of them if none is near.

    alike: the least `difflib` ratio of a near one, from 0 to 1.
    """
    known = sorted(known)
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=alike)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(known)}"


def one_line(error: BaseException) -> str:
    """The message of an error on one line, shortened, without control characters of a terminal."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return text if text.isprintable() else ascii(text)[1:-1]


def named(error: BaseException) -> str:
    """The type and the message, as `one_line`, of an error that was not raised on purpose."""
    kind, line = type(error).__name__, one_line(error)
    return line if line == kind else f"{kind}: {line}"


def shown(value: object) -> str:
    """A value from outside for a message: on one line, and shortened."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    try:
        text = short.repr(value)
    except ValueError:  # a number of more digits than Python writes out
        text = f"a {type(value).__name__} of very many digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
