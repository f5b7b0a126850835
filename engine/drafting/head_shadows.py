"""What an MTP layer keeps of running sequences: its own keys and values, and what its next rows continue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from engine.drafting.shadows import Shadow, Shadows, SharedPrefix
from engine.memory import accelerator
from engine.schedule.pieces import whole
from engine.schedule.segment import Segment
from engine.schedule.sequence import Prefix, Sequence, Span

MOST_KEPT = 16
"""The most rows of the model's output that wait for the layer: those of two sweeps with the longest drafts."""


@dataclass(eq=False, kw_only=True)
class HeadShadow(Shadow):
    """The rows of a sequence in an MTP layer: each takes a token, and the model's output for the token before it.

    So a sequence's first token has no row. Rows of drafted tokens continue the layer's own output; they are computed
    again when the model's output is known.
    """

    num_final: int = 0
    """The number of own rows that continue the model's output."""
    kept: Any = None
    """The model's output `[rows, width]` for the tokens of the sequence from `first_kept` on."""
    first_kept: int = 0
    output: Any = None
    """The layer's output `[1, width]` for the row that was computed last."""

    @property
    def coming(self) -> list[int]:
        """As in `Shadow`; the first row is that of the second token."""
        return self.target.tokens[self.start + 1 - self.target.start :]

    def keep(self, past: int, states: torch.Tensor) -> bool:
        """Keep the model's output for the sequence's tokens from the one numbered `past`; False where some lack."""
        first = past - self.first_kept
        if not 0 <= first <= len(self.kept) or first + len(states) > MOST_KEPT:
            return False
        self.kept = torch.cat([self.kept[:first], states])
        return True

    def step(self) -> Segment | None:
        """The rows of all tokens since the last step; None if the model's output for one of them was not kept.

        Those of drafted tokens are written again.
        """
        coming = self.coming
        count, first = len(coming) - self.num_final, self.start - self.target.start + self.num_final - self.first_kept
        if first < 0 or count < 1 or first + count > len(self.kept):
            return None
        self.tokens, self.cached = coming, self.num_final
        segment = Segment(self, count, continued=self.kept[first : first + count])
        self.num_final, self.first_kept, self.kept = len(coming), len(self.target.tokens) - 1, self.kept[:0]
        return segment

    def next_row(self) -> Segment:
        """As in `Shadow`; it continues the layer's own output."""
        return Segment(self, 1, continued=self.output)


@dataclass(eq=False, kw_only=True)
class _Ended(SharedPrefix):
    """A prefix in the layer's cache."""

    end: torch.Tensor
    """The model's output `[1, width]` for its last token, which rows of what follows it continue."""


class HeadShadows(Shadows):
    """The shadows of running sequences in an MTP layer, begun while the model computes their prompts.

    The model's output for a prompt is there only then. A prefix stays as long as it is in the model's cache.
    """

    def begin(self, target: Sequence) -> list[Segment] | None:
        """None: what the model has computed before cannot be followed any more."""
        return None

    def note(self, segments: list[Segment], states: torch.Tensor) -> None:
        """Keep the layer's output for the last row of each shadow: states `[rows, width]`."""
        found = [segment for segment in segments if isinstance(segment.span, HeadShadow)]
        if found:
            last = torch.tensor([segment.first + segment.num_rows - 1 for segment in found])
            rows = states[accelerator.sent(last, states.device)]
            for segment, row in zip(found, rows.split(1), strict=True):
                assert isinstance(segment.span, HeadShadow)
                segment.span.output = row

    def is_followed(self, segment: Segment) -> bool:
        """Whether the model's output for these rows may be of use: what is not cached does not go on."""
        span = segment.span
        if segment.past:
            return isinstance(span, Sequence) and self.get(span) is not None
        return span.block is not None and not (isinstance(span, Sequence) and span.is_alone)

    def follow(self, segment: Segment, states: torch.Tensor) -> list[Segment]:
        """The rows to compute now, with the model's normed output `[rows, width]` for a segment.

        Of a decode step the output is kept, since the model is yet to choose the next token.
        """
        span = segment.span
        if not segment.past:
            return self._begin(span, states)
        shadow = self.get(span) if isinstance(span, Sequence) else None
        if isinstance(shadow, HeadShadow) and not shadow.keep(segment.past, states):
            self.drop(shadow)
        return []

    @property
    def num_kept(self) -> int:
        """The rows of the model's output that are kept for sequences."""
        return sum(len(shadow.kept) for shadow in self if isinstance(shadow, HeadShadow))

    def _begin(self, span: Span, states: torch.Tensor) -> list[Segment]:
        """The rows of a prefix or a prompt that the model has computed, perhaps not for the first time."""
        self.forget(span)
        before = None
        if span.parent is not None:
            shared = self._shared.get(id(span.parent))
            if not isinstance(shared, _Ended):
                return []
            before = shared.end
        parent = self._last_piece(span.parent)
        end = states[-1:].clone()
        skipped = 1 if before is None else 0
        tokens = span.tokens[skipped:]
        new: Span
        if isinstance(span, Sequence):
            new = HeadShadow.of_target(span, parent)
            new.tokens, new.num_prompt = tokens, new.num_prompt - skipped
        else:
            new = Prefix(tokens=tokens, parent=parent)
        pieces = [*self._split(new), new]
        for piece in pieces:
            piece.block = self._room.allocate(piece.capacity) if piece.capacity else None
        if any(piece.block is None and piece.capacity for piece in pieces):
            self._free(pieces)
            return []
        if isinstance(new, HeadShadow):
            self._of[id(span)] = new
            new.num_final, new.kept, new.first_kept = len(new.tokens), end, len(span.tokens) - 1
        elif isinstance(span, Prefix):
            own = tuple(piece for piece in pieces if isinstance(piece, Prefix) and piece.tokens)
            self._shared[id(span)] = _Ended(original=span, pieces=own, end=end)
        rows = states[:-1] if before is None else torch.cat([before, states[:-1]])
        segments = [whole(piece, self._limits) for piece in pieces if piece.tokens]
        for segment in segments:
            segment.continued, rows = rows[: segment.num_rows], rows[segment.num_rows :]
        return segments

    def forget(self, span: Span) -> None:
        """Drop what was computed of a span before."""
        if isinstance(span, Sequence):
            shadow = self.get(span)
            if shadow is not None:
                self.drop(shadow)
            return
        shared = self._shared.pop(id(span), None)
        if shared is not None:
            for shadow in self:
                if span in shadow.target.chain:
                    self.drop(shadow)
            self._free(shared.pieces)

    def _last_piece(self, prefix: Prefix | None) -> Prefix | None:
        pieces = () if prefix is None else self._shared[id(prefix)].pieces
        return pieces[-1] if pieces else None  # a first token alone has no row

    def tidy(self) -> None:
        """Drop prefixes that are no longer in the model's cache."""
        for key, shared in list(self._shared.items()):
            if shared.original.block is None:
                del self._shared[key]
                self._free(shared.pieces)

    def clear(self) -> None:
        """Drop all shadows and prefixes."""
        super().clear()
        for shared in self._shared.values():
            self._free(shared.pieces)
        self._shared.clear()
