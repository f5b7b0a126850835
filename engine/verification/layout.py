"""Assigns table rows to the tokens of texts, and groups the texts for calls of stock layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from engine.schedule.sequence import Sequence as Scheduled
from engine.schedule.sequence import Span


@dataclass(frozen=True)
class Rectangle:
    """Pieces of texts, of equal length and after equally many tokens, with which stock layers are called together."""

    num_before: int
    """The number of tokens before each of them."""
    before: tuple[int, ...]
    """The pieces that contain these tokens, in order, as parts of earlier rectangles."""
    ids: torch.Tensor
    """The token ids int64 `[pieces, length]`, on the host."""
    taken: torch.Tensor
    """The table rows of the rectangle's rows, in order, on the table's device."""
    kept: torch.Tensor | None
    """The rows of the rectangle whose results are stored in the table, on the device; None for all."""
    put: torch.Tensor
    """The table rows in which they are stored."""
    followed: Mapping[int, int]
    """The pieces that others continue, each with its index in the rectangle."""


@dataclass(frozen=True)
class Layout:
    """The table rows of the tokens of a pass's texts."""

    num_rows: int
    first_row: Mapping[int, int]
    """The first row of each span, by its identity."""
    rows: Sequence[torch.Tensor]
    """The rows of each text, token by token, on the table's device."""
    rectangles: Sequence[Rectangle]
    """The rectangles in an order in which each comes after the pieces before it."""

    @property
    def longest_continued(self) -> int:
        """The number of tokens of the longest text that is cut into pieces; 0 if none is."""
        return max((each.num_before + each.ids.shape[1] for each in self.rectangles if each.before), default=0)


@dataclass(frozen=True)
class _Piece:
    """Consecutive tokens of one call of stock layers."""

    before: tuple[int, ...]
    ids: list[int]
    num_before: int
    rows: torch.Tensor
    is_new: torch.Tensor
    """Whether each row is new, i.e. in no earlier piece."""


class _Rows:
    """Assigns a row to every token of some texts, with one row for all texts that share a prefix."""

    def __init__(self) -> None:
        self.first: dict[int, int] = {}
        self.count = 0

    def of(self, span: Span, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of a span's tokens, and whether each is new."""
        is_new = id(span) not in self.first
        if is_new:
            self.first[id(span)] = self.count
            self.count += size
        return torch.arange(size) + self.first[id(span)], torch.full((size,), is_new)


def lay_out_rows(
    sequences: Sequence[Scheduled],
    fed: Sequence[list[int]],
    rows_per_batch: int,
    *,
    device: torch.device,
    table_device: torch.device,
    continues: bool,
) -> Layout:
    """Assign a row to every token, shared prefixes once, and cut the texts into rectangles.

    fed: the token ids of each text, its prefixes included. continues: whether prefixes that several texts share are
    pieces of their own; else every text is one. A rectangle has at most `rows_per_batch` tokens, those before it
    included, or one piece.
    """
    rows, pieces, whole = _Rows(), list[_Piece](), list[torch.Tensor]()
    number_of: dict[int, int] = {}
    num_followers = _followers(sequences)
    for sequence, ids in zip(sequences, fed, strict=True):
        before: tuple[int, ...] = ()
        first, at = 0, 0
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        text: list[torch.Tensor] = []
        for span in (*sequence.chain, sequence):
            size = len(ids) - sequence.start if span is sequence else len(span.tokens)
            parts.append(rows.of(span, size))
            text.append(parts[-1][0])
            at += size
            if span is not sequence and not (continues and num_followers[id(span)] > 1):
                continue
            if id(span) not in number_of:
                number_of[id(span)] = len(pieces)
                of_piece, is_new = (torch.cat(each) for each in zip(*parts, strict=True))
                pieces.append(_Piece(before, ids[first:at], first, of_piece, is_new))
            before, first, parts = (*before, number_of[id(span)]), at, []
        whole.append(torch.cat(text))
    continued = {number for piece in pieces for number in piece.before}
    return Layout(
        rows.count,
        rows.first,
        [each.to(table_device) for each in whole],
        [_rectangle(part, pieces, continued, device, table_device) for part in _together(pieces, rows_per_batch)],
    )


def _followers(sequences: Sequence[Scheduled]) -> dict[int, int]:
    """The number of spans that continue each prefix."""
    spans = {id(span): span for sequence in sequences for span in (*sequence.chain, sequence)}
    count = dict.fromkeys(spans, 0)
    for span in spans.values():
        if span.parent is not None:
            count[id(span.parent)] += 1
    return count


def _together(pieces: Sequence[_Piece], rows_per_batch: int) -> list[list[int]]:
    """The numbers of pieces that form a rectangle, after those that they continue."""

    def kind(number: int) -> tuple[int, tuple[int, ...], int]:
        piece = pieces[number]
        return len(piece.before), piece.before, len(piece.ids)

    parts = []
    for (_, _, length), same in groupby(sorted(range(len(pieces)), key=kind), key=kind):
        members = list(same)
        size = max(1, rows_per_batch // (pieces[members[0]].num_before + length))
        parts += [members[first : first + size] for first in range(0, len(members), size)]
    return parts


def _rectangle(
    members: list[int],
    pieces: Sequence[_Piece],
    continued: Collection[int],
    device: torch.device,
    table_device: torch.device,
) -> Rectangle:
    listed = [pieces[number] for number in members]
    taken = torch.cat([piece.rows for piece in listed])
    kept = torch.cat([piece.is_new for piece in listed]).nonzero()[:, 0]
    is_whole = len(kept) == len(taken)
    return Rectangle(
        num_before=listed[0].num_before,
        before=listed[0].before,
        ids=torch.tensor([piece.ids for piece in listed]),
        taken=taken.to(table_device),
        kept=None if is_whole else kept.to(device),
        put=taken[kept].to(table_device),
        followed={number: place for place, number in enumerate(members) if number in continued},
    )
