"""Chooses how many tokens to draft from the acceptance rate and the measured times of drafts and sweeps (pure)."""

from __future__ import annotations

import math

MOST_DRAFTED = 7
"""The most tokens of a draft."""
_FIRST_SIZE = 3
"""The number of tokens of a draft before anything is measured."""
_KEPT = 0.9
"""The factor by which each new measurement reduces the weight of earlier ones: about the last ten count."""
_KEPT_TOKENS = 500.0
"""The most checked tokens that the acceptance rate remembers."""
_PRIOR = (3.0, 4.0)
"""Assumed accepted and checked tokens at the start; few, so that measurements soon outweigh them."""
_EVERY = 32
"""While all sweeps have about as many rows, one in so many runs without drafts, to measure the cost of rows."""
_FIRST_WITHOUT = 8
"""The number of sweeps with drafts before the first one without: sweeps of prompts come first, with other row
counts."""
_SPREAD = 0.3
"""The least standard deviation of row counts, relative to their mean, at which the fitted line tells the cost of a
row."""
_LEAST_GAIN = 1.02
"""The least ratio of tokens per second with drafts to those without for drafting to go on."""
_PAUSE = 32
"""The number of sweeps without drafts after they did not pay; it doubles each time."""


_FIRST_SEQUENCES = 8
"""The most sequences that are drafted for before the time of a pass over their prompts is known."""
_TRIED_AGAIN = 64
"""One in so many shadows that seem not to pay is begun nevertheless: the first measured pass is no guide, since it
includes the compilation of kernels."""


class Line:
    """A straight line fitted to the latest measurements: seconds by rows."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float) -> None:
        """Add a measurement."""
        sums = (self._weight, self._x, self._y, self._xx, self._xy)
        new = (1.0, x, y, x * x, x * y)
        self._weight, self._x, self._y, self._xx, self._xy = (
            _KEPT * old + each for old, each in zip(sums, new, strict=True)
        )

    @property
    def is_known(self) -> bool:
        """Whether anything was measured."""
        return self._weight > 0

    @property
    def spread(self) -> float:
        """Standard deviation of the measurements' rows, in parts of their mean."""
        mean, square = self._x / max(1e-9, self._weight), self._xx / max(1e-9, self._weight)
        return math.sqrt(max(0.0, square - mean * mean)) / max(1e-9, mean)

    @property
    def slope(self) -> float:
        """The seconds of a further row; 0 while all measurements had equally many rows."""
        spread = self._weight * self._xx - self._x * self._x
        if self.spread < 1e-4:
            return 0.0
        steepest = self._y / self._x  # through the origin: fewer rows never take less than none
        return min(steepest, max(0.0, (self._weight * self._xy - self._x * self._y) / spread))

    def at(self, x: float) -> float:
        """The estimated seconds for so many rows."""
        return max(0.0, (self._y + self.slope * (self._weight * x - self._x)) / self._weight)


class Pace:
    """Chooses the draft length with the most expected tokens per second; 0 where no length pays."""

    def __init__(self) -> None:
        self._came, self._tried = _PRIOR
        self.sweeps = Line()
        """The times of the model's sweeps by their rows."""
        self.steps = Line()
        """The times of the draft model's passes by their rows."""
        self.last_size = _FIRST_SIZE
        """The latest length of a draft."""
        self._until_without = _FIRST_WITHOUT
        self._pause = _PAUSE
        self._left = 0
        """The number of sweeps without drafts still to come, since drafts did not pay."""
        self._num_refused = 0
        """The number of shadows in a row that were not worth beginning."""

    @property
    def acceptance(self) -> float:
        """The estimated probability that a drafted token is accepted."""
        return self._came / self._tried

    def checked(self, came: int, tried: int) -> None:
        """Record how many of the checked tokens were accepted, up to the first that was not."""
        self._came, self._tried = self._came + came, self._tried + tried
        if self._tried > _KEPT_TOKENS:
            self._came, self._tried = self._came * _KEPT_TOKENS / self._tried, _KEPT_TOKENS

    def tokens(self, size: int) -> float:
        """The expected tokens of a step with a draft of `size`: a token counts if all before it are accepted."""
        return sum(self.acceptance**number for number in range(size + 1))

    def size(self, count: int, rows: int) -> int:
        """The number of tokens to draft for each of `count` sequences in a sweep of `rows` other rows; 0: none."""
        if self._left:
            self._left -= 1
            return 0
        self._until_without -= 1
        if self.sweeps.spread > _SPREAD:
            self._until_without = max(1, self._until_without)
        elif self._until_without <= 0:
            self._until_without = _EVERY
            return 0
        if not (self.sweeps.is_known and self.steps.is_known):
            return _FIRST_SIZE
        rates = [self.tokens(size) / self._seconds(size, count, rows) for size in range(MOST_DRAFTED + 1)]
        best = max(range(MOST_DRAFTED + 1), key=rates.__getitem__)
        if rates[best] < _LEAST_GAIN * rates[0]:
            self.give_up()
            return 0
        self._pause, self.last_size = _PAUSE, best
        return best

    def give_up(self) -> None:
        """Stop drafting for some sweeps, twice as many each time."""
        self._left, self._pause = self._pause, 2 * self._pause
        self._came, self._tried = _PRIOR  # the next try tells anew

    @property
    def is_paused(self) -> bool:
        """Whether drafting is paused because it did not pay."""
        return self._left > 0

    def _seconds(self, size: int, count: int, rows: int) -> float:
        return max(1e-9, self.sweeps.at(rows + size * count) + size * self.steps.at(count))

    def pays_to_begin(self, tokens: int, left: int, count: int, size: int) -> bool:
        """Whether a draft model's pass over `tokens` of a sequence saves more time than it takes.

        The sequence has `left` tokens to come at most, and is one of `count` that a sweep advances.
        """
        if not (self.sweeps.is_known and self.steps.is_known):
            return True
        saved = (left - left / self.tokens(size)) * self.sweeps.at(count) / count
        if tokens * self.steps.slope < saved:
            return True
        self._num_refused += 1
        return self._num_refused % _TRIED_AGAIN == 0

    def most_sequences(self, count: int) -> int:
        """The number of sequences, of `count`, that are drafted for now."""
        return count if self.steps.is_known else min(count, _FIRST_SEQUENCES)
