"""How much of the prompts' time overlaps with transfers of keys and values, where a few enter at a time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Prompts of one house full of sequences after the other, let in over several sweeps (`engine.admission`)."""

    sweeps: int
    """Sweeps that the sequences of a full house take to come in."""
    houses: float
    """Full houses among all requests."""
    prefill_s: float
    """Seconds that all prompts take."""
    weights_s: float
    """Seconds that a sweep's streamed weights take."""
    cache_s: float
    """Seconds that keys and values of a full house take."""

    @property
    def hidden_s(self) -> float:
        """Seconds in which prompts are computed and something is brought.

        The first house fills evenly from sweep to sweep, after the first, in which nothing else is brought than what
        any prefill needs; those that follow find it full.
        """
        computing = self.prefill_s / self.houses / self.sweeps  # in each sweep that lets somebody in
        full = min(computing, self.weights_s + self.cache_s)
        return (self.sweeps - 1) * self._while_filling(computing) + self.sweeps * (self.houses - 1) * full

    def _while_filling(self, computing: float) -> float:
        """The mean over the first sweeps of the shorter of computing and bringing, which grows from weights alone."""
        if self.cache_s <= 0:
            return min(computing, self.weights_s)
        even = min(1.0, max(0.0, (computing - self.weights_s) / self.cache_s))  # where both take as long
        return self.weights_s * even + self.cache_s * even**2 / 2 + computing * (1 - even)
