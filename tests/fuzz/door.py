"""A fuzz target: a place where outside content enters the program, and the outcomes allowed there."""

from __future__ import annotations

import signal
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from hypothesis.strategies import SearchStrategy

from engine.errors import EngineError

LIMIT_S = 20.0
"""Most seconds of a case, unless its target has another limit; usual cases take milliseconds."""
STARTS_S = 300.0
"""Most seconds until the second case begins."""
_LONGEST_LINE = 4000
ACCEPTED, REFUSED = "accepted", "refused in one line"


class BadLine(AssertionError):
    """A refusal whose message is not one line, or not safe to print on a terminal."""


class TooLong(BaseException):
    """A case that takes longer than its limit; no `Exception`, because parsers would report that as invalid content."""


@dataclass(frozen=True)
class Door:
    """A fuzz target."""

    name: str
    cases: Callable[[], SearchStrategy[Any]]
    """Returns the strategy of its cases; the files that it needs exist by then."""
    opened: Callable[[], Callable[[Any], object]]
    """Returns the function that is called with a case, and raises `EngineError` to refuse it."""
    is_guided: bool = True
    """Whether a coverage-guided fuzzer can generate its cases."""
    limit_s: float = LIMIT_S
    """Most seconds of a case."""


@dataclass
class Find:
    """A kind of forbidden outcome, and the shortest case that led to it."""

    told: str
    case: str
    count: int = 1


@dataclass
class Tally:
    """The outcomes of a target's cases so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    finds: dict[str, Find] = field(default_factory=dict)

    @property
    def num_cases(self) -> int:
        """Number of cases."""
        return sum(self.outcomes.values()) + sum(find.count for find in self.finds.values())

    def enter(self, let_in: Callable[[Any], object], case: Any, limit_s: float = LIMIT_S) -> None:
        """Run a case and record its outcome; raises nothing."""
        try:
            outcome = outcome_of(let_in, case, limit_s)
        except (Exception, TooLong) as error:
            self.note(place_of(error), _told(error), repr(case))
        else:
            self.outcomes[outcome] += 1

    def note(self, kind: str, told: str, case: str, count: int = 1) -> None:
        """Record a finding; of several cases of a kind, the shortest is kept."""
        known = self.finds.get(kind)
        if known is None:
            self.finds[kind] = Find(told, case, count)
            return
        known.count += count
        if len(case) < len(known.case):
            known.told, known.case = told, case


def outcome_of(let_in: Callable[[Any], object], case: Any, limit_s: float = LIMIT_S) -> str:
    """Run a case and return its outcome; raises an outcome that is forbidden."""
    before = signal.signal(signal.SIGALRM, _late)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        let_in(case)
    except EngineError as error:
        check_line(str(error))
        return REFUSED
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return ACCEPTED


def check_line(line: str) -> None:
    """Raise `BadLine` unless the message is one printable line of moderate length."""
    if not line.isprintable() or not line.strip() or len(line) > _LONGEST_LINE:
        raise BadLine(f"{len(line)} characters: {line[:300]!r}")


def place_of(error: BaseException) -> str:
    """Return the error's type and the innermost line of this package in its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/engine/" in frame.filename or "/flexgen_helm/" in frame.filename]
    own = [frame for frame in ours if "/tests/" not in frame.filename and "/site-packages/" not in frame.filename]
    at = (own or frames)[-1]
    return f"{type(error).__name__} at {'/'.join(at.filename.split('/')[-3:])}:{at.lineno}"


def _late(number: int, frame: FrameType | None) -> None:
    raise TooLong("it takes too long")


def _told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-3000:]
