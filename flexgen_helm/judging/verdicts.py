"""The outcomes of the verdicts on a run's answers; imports nothing."""

from __future__ import annotations

from dataclasses import dataclass

READ, UNREADABLE, UNANSWERED = "read", "unreadable", "unanswered"
"""A verdict's outcome: the annotator could read it, it could not, or the judge gave no answer."""
VERDICT = "verdict"
"""The key of an annotation with the verdict; missing if HELM's own rule decides, as for an empty answer."""


@dataclass(frozen=True)
class Verdicts:
    """The number of a run's answers that were to be judged, and of each outcome."""

    read: int = 0
    unreadable: int = 0
    unanswered: int = 0

    @property
    def asked(self) -> int:
        """All answers that were to be judged."""
        return self.read + self.unreadable + self.unanswered

    @property
    def told(self) -> str:
        """A message with the number of missing verdicts, and why."""
        parts = [
            f"{number} {what}"
            for number, what in ((self.unreadable, "could not be read"), (self.unanswered, "were not given"))
            if number
        ]
        return f"of {self.asked} verdicts {' and '.join(parts)}; these answers score nothing"
