"""The draft model's copies of running sequences: their tokens, and its own keys and values of them (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Self

from engine.planning.limits import Limits
from engine.schedule.cache_room import CacheRoom
from engine.schedule.pieces import whole
from engine.schedule.prefix import common_length
from engine.schedule.segment import Segment
from engine.schedule.sequence import Prefix, Sequence, Span

_MOST_BEHIND = 8
"""The most tokens that a shadow can catch up in a decode step; a shadow further behind restarts with a prefill."""


@dataclass(eq=False, kw_only=True)
class Shadow(Sequence):
    """The draft model's copy of a running sequence.

    It draws the same random numbers, so that both models choose the same token where their distributions agree.
    """

    target: Sequence
    """The sequence that it drafts for."""
    proposed: tuple[int, ...] = ()
    """The drafted tokens that are being checked, which follow the first `num_known` tokens of the sequence."""
    num_known: int = 0
    """The length of the sequence when they were drafted."""

    @classmethod
    def of_target(cls, target: Sequence, parent: Prefix | None) -> Self:
        """The shadow of a running sequence, of which nothing is computed yet."""
        job = replace(target.job, prompt_logprobs=False, thinking=None)  # nothing is scored, and no token is due
        tokens = list(target.tokens)
        return cls(
            job=job,
            tokens=tokens,
            num_prompt=target.num_prompt,
            parent=parent,
            target=target,
            num_known=len(tokens),
        )

    @property
    def coming(self) -> list[int]:
        """The sequence's tokens from this span's first one on, without those that were moved into prefixes."""
        return self.target.tokens[self.start - self.target.start :]

    def draw(self, ahead: int = 0) -> float:
        """The random number by which the sequence will choose the same token."""
        number = len(self.tokens) - self.num_prompt + ahead
        return self.target.draw(number - len(self.target.generated_logprobs))

    def take(self, token: int) -> None:
        """Append a token, which is computed next."""
        if len(self.tokens) < self.cached:  # several rows have brought it up to its sequence
            self.tokens = self.coming
        self.tokens.append(token)

    def settle(self) -> tuple[int, int] | None:
        """Compare the drafted tokens with the sequence: (accepted, checked); None if the sequence was restarted.

        Rows computed for rejected tokens are discarded: they are written again.
        """
        new = self.target.tokens[self.num_known :]
        if len(self.target.tokens) < self.num_known:
            return None
        came = common_length([*self.proposed], new)
        tried = came + (came < min(len(self.proposed), len(new)))
        self.cached = min(self.cached, self.num_known - (self.start - self.target.start) + came)
        self.proposed, self.num_known = (), len(self.target.tokens)
        return came, tried

    def step(self) -> Segment | None:
        """The rows that bring it up to date with its sequence; None if it is too far behind."""
        coming = self.coming
        if len(coming) - self.cached > _MOST_BEHIND:
            return None
        self.tokens = coming[: self.cached + 1]
        return Segment(self, len(coming) - self.cached, draft=tuple(coming[self.cached + 1 :]))

    def next_row(self) -> Segment:
        """The row of the token that was drafted last."""
        return Segment(self, 1)


@dataclass(eq=False)
class SharedPrefix:
    """A prefix in the draft model's cache, in as many pieces as its memory requires."""

    original: Prefix
    pieces: tuple[Prefix, ...]
    users: set[int] = field(default_factory=set)
    """The id() of each sequence whose shadow continues it."""


class Shadows:
    """The shadows of running sequences, the prefixes that they share, and their space in the draft's cache."""

    def __init__(self, room: CacheRoom, limits: Limits) -> None:
        self._room, self._limits = room, limits
        self._of: dict[int, Shadow] = {}
        """The shadows by the id() of their sequence."""
        self._shared: dict[int, SharedPrefix] = {}
        """The prefixes by their id()."""

    def __iter__(self) -> Iterator[Shadow]:
        return iter(list(self._of.values()))

    def get(self, target: Sequence) -> Shadow | None:
        """The shadow of a sequence, if it has one."""
        return self._of.get(id(target))

    def begin(self, target: Sequence) -> list[Segment] | None:
        """Begin a shadow of `target`: return the segments that compute it; None while the cache has no room for it."""
        new: list[Span] = []
        for prefix in target.chain:
            if id(prefix) not in self._shared:
                parent = self._last_piece(prefix.parent)
                mirrored = Prefix(tokens=prefix.tokens, parent=parent)
                pieces = (*self._split(mirrored), mirrored)
                self._shared[id(prefix)] = SharedPrefix(prefix, pieces)
                new += pieces
            self._shared[id(prefix)].users.add(id(target))
        shadow = Shadow.of_target(target, self._last_piece(target.parent))
        heads = self._split(shadow)
        self._of[id(target)] = shadow
        new += [*heads, shadow]
        for span in new:
            span.block = self._room.allocate(span.capacity)
            if span.block is None:
                self.drop(shadow)
                return None
        return [whole(span, self._limits) for span in new]

    def _split(self, span: Span) -> list[Prefix]:
        most = self._limits.rows_per_piece
        return span.split(most) if most is not None and span.num_rows > most else []

    def _last_piece(self, prefix: Prefix | None) -> Prefix | None:
        return None if prefix is None else self._shared[id(prefix)].pieces[-1]

    def drop(self, shadow: Shadow) -> None:
        """Drop a shadow, and the prefixes that no other shadow continues."""
        del self._of[id(shadow.target)]
        shared = [each for each in self._shared.values() if id(shadow.target) in each.users]
        kept = {id(piece) for each in self._shared.values() for piece in each.pieces}
        self._free([shadow, *(piece for piece in shadow.chain if id(piece) not in kept)])
        for each in shared:
            each.users.discard(id(shadow.target))
            if not each.users:
                del self._shared[id(each.original)]
                self._free(each.pieces)

    def _free(self, spans: Iterable[Span]) -> None:
        for span in spans:
            if span.block is not None:
                self._room.free(span.block)
                span.block = None

    def clear(self) -> None:
        """Drop all shadows."""
        for shadow in self:
            self.drop(shadow)
