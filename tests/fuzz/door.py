"""A door: where content from outside comes in, and what may become of it there."""

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
"""Of a case, unless its door has another: what is usual is some milliseconds."""
STARTS_S = 300.0
"""Of what comes before the second case."""
_LONGEST_LINE = 4000
ACCEPTED, REFUSED = "accepted", "refused in one line"


class BadLine(AssertionError):
    """A refusal that is no line, or not one that a terminal may be sent."""


class TooLong(BaseException):
    """A case that takes longer than its limit; no `Exception`, which readers take for a fault of the content."""


@dataclass(frozen=True)
class Door:
    """Where content comes in."""

    name: str
    cases: Callable[[], SearchStrategy[Any]]
    """Makes the strategy of its cases; what that needs of files is made by then."""
    opened: Callable[[], Callable[[Any], object]]
    """Makes what lets one case in, which raises `EngineError` where it is refused."""
    is_guided: bool = True
    """Whether a fuzzer that follows what code is reached can make its cases."""
    limit_s: float = LIMIT_S
    """Of a case."""


@dataclass
class Find:
    """A kind of outcome that may not be, and the shortest case that led to it."""

    told: str
    case: str
    count: int = 1


@dataclass
class Tally:
    """What became of the cases of a door so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    finds: dict[str, Find] = field(default_factory=dict)

    @property
    def num_cases(self) -> int:
        """Of all outcomes."""
        return sum(self.outcomes.values()) + sum(find.count for find in self.finds.values())

    def enter(self, let_in: Callable[[Any], object], case: Any, limit_s: float = LIMIT_S) -> None:
        """Let a case in, and note what became of it; raises nothing."""
        try:
            outcome = outcome_of(let_in, case, limit_s)
        except (Exception, TooLong) as error:
            self.note(place_of(error), _told(error), repr(case))
        else:
            self.outcomes[outcome] += 1

    def note(self, kind: str, told: str, case: str, count: int = 1) -> None:
        """Note a find of a kind; of several cases the shortest is kept."""
        known = self.finds.get(kind)
        if known is None:
            self.finds[kind] = Find(told, case, count)
            return
        known.count += count
        if len(case) < len(known.case):
            known.told, known.case = told, case


def outcome_of(let_in: Callable[[Any], object], case: Any, limit_s: float = LIMIT_S) -> str:
    """What becomes of a case; raises what it may not lead to."""
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
    """Raise `BadLine` for a message that is not one printable line of moderate length."""
    if not line.isprintable() or not line.strip() or len(line) > _LONGEST_LINE:
        raise BadLine(f"{len(line)} characters: {line[:300]!r}")


def place_of(error: BaseException) -> str:
    """The kind of an error and the innermost line of this package's that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/engine/" in frame.filename or "/flexgen_helm/" in frame.filename]
    own = [frame for frame in ours if "/tests/" not in frame.filename and "/site-packages/" not in frame.filename]
    at = (own or frames)[-1]
    return f"{type(error).__name__} at {'/'.join(at.filename.split('/')[-3:])}:{at.lineno}"


def _late(number: int, frame: FrameType | None) -> None:
    raise TooLong("it takes too long")


def _told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-3000:]
