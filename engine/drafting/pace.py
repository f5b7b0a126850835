"""How many tokens a draft model drafts, by what came of its drafts and what they and sweeps take (pure)."""

from __future__ import annotations

import math

MOST_DRAFTED = 7
"""Tokens of a draft, at most."""
_FIRST_SIZE = 3
"""Tokens of a draft before anything is known."""
_KEPT = 0.9
"""Of what was measured before, what counts beside a new measurement: about the last ten do."""
_KEPT_TOKENS = 500.0
"""Tokens tried, at most, that count for how many come."""
_PRIOR = (3.0, 4.0)
"""Tokens that came, of those tried, before any is: few, so that the first sweeps tell."""
_EVERY = 32
"""One sweep of so many drafts nothing where all have about as many rows, so that it shows what rows cost."""
_FIRST_WITHOUT = 8
"""Sweeps with drafts before the first such one: before them come those of the prompts, which have other rows."""
_SPREAD = 0.3
"""Standard deviation of rows, in parts of their mean, from which on the line through them tells what rows cost."""
_LEAST_GAIN = 1.02
"""Tokens in a second, beside those without drafts, below which drafts do not pay."""
_PAUSE = 32
"""Sweeps without drafts where they do not pay, before they are tried again; each time twice as many."""


_FIRST_SEQUENCES = 8
"""That are drafted for before it is known what a pass over their prompts takes."""
_TRIED_AGAIN = 64
"""One shadow of so many that seem to cost more than they save is begun all the same: what the first pass took is no
measure, since kernels are compiled in it."""


class Line:
    """A straight line through the latest measurements: seconds by rows."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float) -> None:
        """Take in a measurement."""
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
        """Seconds of a further row; none is known to cost anything while all measurements had as many."""
        spread = self._weight * self._xx - self._x * self._x
        if self.spread < 1e-4:
            return 0.0
        steepest = self._y / self._x  # through the origin: fewer rows never take less than none
        return min(steepest, max(0.0, (self._weight * self._xy - self._x * self._y) / spread))

    def at(self, x: float) -> float:
        """Seconds of so many rows."""
        return max(0.0, (self._y + self.slope * (self._weight * x - self._x)) / self._weight)


class Pace:
    """Chooses the length of drafts by the tokens a second that it promises; none where none pays."""

    def __init__(self) -> None:
        self._came, self._tried = _PRIOR
        self.sweeps = Line()
        """Seconds of the model's sweeps, by their rows."""
        self.steps = Line()
        """Seconds of the draft model's passes, by their rows."""
        self._until_without = _FIRST_WITHOUT
        self._pause = _PAUSE
        self._left = 0
        """Sweeps without drafts still to come, since drafts do not pay."""
        self._num_refused = 0
        """Shadows that were not worth beginning."""

    @property
    def acceptance(self) -> float:
        """Of the tokens tried, about the part that came."""
        return self._came / self._tried

    def checked(self, came: int, tried: int) -> None:
        """Note how many tokens came of those that were tried, up to the first that did not."""
        self._came, self._tried = self._came + came, self._tried + tried
        if self._tried > _KEPT_TOKENS:
            self._came, self._tried = self._came * _KEPT_TOKENS / self._tried, _KEPT_TOKENS

    def tokens(self, size: int) -> float:
        """Tokens that a step with a draft of so many yields, about: each counts if all before it came."""
        return sum(self.acceptance**number for number in range(size + 1))

    def size(self, count: int, rows: int) -> int:
        """Tokens to draft for each of `count` sequences in a sweep that has so many rows without; 0: none."""
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
        self._pause = _PAUSE
        return best

    def give_up(self) -> None:
        """Draft nothing for some sweeps, and more with each time."""
        self._left, self._pause = self._pause, 2 * self._pause
        self._came, self._tried = _PRIOR  # the next try tells anew

    @property
    def is_paused(self) -> bool:
        """Whether the next sweeps draft nothing, since drafts do not pay."""
        return self._left > 0

    def _seconds(self, size: int, count: int, rows: int) -> float:
        return max(1e-9, self.sweeps.at(rows + size * count) + size * self.steps.at(count))

    def pays_to_begin(self, tokens: int, left: int, count: int, size: int) -> bool:
        """Whether a draft model's pass over `tokens` of a sequence saves more than it takes.

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
        """How many of `count` sequences are drafted for now."""
        return count if self.steps.is_known else min(count, _FIRST_SEQUENCES)
