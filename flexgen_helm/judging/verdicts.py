"""What became of the verdicts on a run's answers; imports nothing."""

from __future__ import annotations

from dataclasses import dataclass

READ, UNREADABLE, UNANSWERED = "read", "unreadable", "unanswered"
"""What became of a verdict: the annotator could read it, it could not, the judge gave no answer."""
VERDICT = "verdict"
"""Where an annotation says so; it is not there where HELM's own rule decides, as for an empty answer."""


@dataclass(frozen=True)
class Verdicts:
    """How many answers of a run were to be judged, and what became of it."""

    read: int = 0
    unreadable: int = 0
    unanswered: int = 0

    @property
    def asked(self) -> int:
        """All."""
        return self.read + self.unreadable + self.unanswered

    @property
    def told(self) -> str:
        """How many are missing, and why."""
        parts = [
            f"{number} {what}"
            for number, what in ((self.unreadable, "could not be read"), (self.unanswered, "were not given"))
            if number
        ]
        return f"of {self.asked} verdicts {' and '.join(parts)}; these answers score nothing"
