"""Hidden states of whole texts that stock layers take from stage to stage, each token of a shared prefix once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from engine.model.stock import StockForward
from engine.model.stub import LayerCall
from engine.schedule.sequence import Sequence as Scheduled


@dataclass(frozen=True)
class Rectangle:
    """Texts of equal length that stock layers are called with together."""

    members: list[int]
    """Which of the pass's texts."""
    ids: torch.Tensor
    """Int64 `[texts, length]`, on the host."""
    taken: torch.Tensor
    """Rows of the table that are the rectangle's rows, in their order."""
    kept: torch.Tensor
    """Rows of the rectangle whose results the table takes: those of a prefix belong to the first text that has it."""


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a pass's texts have their rows in a table of hidden states."""

    num_rows: int
    first_row: Mapping[int, int]
    """Of each span, by its identity."""
    rows: Sequence[torch.Tensor]
    """Of each text, token by token."""
    rectangles: Sequence[Rectangle]


def lay_out_rows(sequences: Sequence[Scheduled], fed: Sequence[list[int]], rows_per_batch: int) -> Layout:
    """Give every token of the texts a row, those of a shared prefix one for all; texts of equal length go together.

    fed: the token ids of each text, its prefixes included.
    """
    first_row: dict[int, int] = {}
    owned: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    count = 0
    for sequence, ids in zip(sequences, fed, strict=True):
        pieces, is_own = [], []
        for span in (*sequence.chain, sequence):
            size = len(ids) - sequence.start if span is sequence else len(span.tokens)
            is_new = id(span) not in first_row
            if is_new:
                first_row[id(span)] = count
                count += size
            pieces.append(torch.arange(size) + first_row[id(span)])
            is_own.append(torch.full((size,), is_new))
        rows.append(torch.cat(pieces))
        owned.append(torch.cat(is_own))
    rectangles = []
    order = sorted(range(len(fed)), key=lambda index: len(fed[index]))
    for length, same in groupby(order, key=lambda index: len(fed[index])):
        members = list(same)
        size = max(1, rows_per_batch // length)
        for first in range(0, len(members), size):
            part = members[first : first + size]
            rectangles.append(
                Rectangle(
                    part,
                    torch.tensor([fed[index] for index in part]),
                    torch.cat([rows[index] for index in part]),
                    torch.cat([owned[index] for index in part]).nonzero()[:, 0],
                )
            )
    return Layout(count, first_row, rows, rectangles)


class Table:
    """Hidden states of a pass, `[rows, width]`, on the device or on the host."""

    def __init__(self, num_rows: int, width: int, dtype: torch.dtype, device: torch.device, *, on_device: bool) -> None:
        self._device = device
        self._rows = torch.empty(num_rows, width, dtype=dtype, device=device if on_device else "cpu")

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows `[count]` (on the host) as they are, on the device."""
        return self._rows.index_select(0, rows.to(self._rows.device)).to(self._device)

    def put(self, rows: torch.Tensor, states: torch.Tensor) -> None:
        """Keep states `[count, width]` of rows `[count]` (on the host)."""
        self._rows.index_copy_(0, rows.to(self._rows.device), states.to(self._rows.device))


class Chain:
    """What stock layers make of a pass's texts, each layer from what it made of the one before."""

    def __init__(self, layout: Layout, stock: StockForward, tables: tuple[Table, Table]) -> None:
        self._layout = layout
        self.stock = stock
        self.before, self.after = tables
        """Hidden states that enter the stage in hand, and those that it makes."""
        self._calls: list[list[LayerCall]] = []

    def put_embedded(self, rectangle: Rectangle, hidden: torch.Tensor, calls: list[LayerCall]) -> None:
        """Keep what the model embeds of the next rectangle, and how it calls its layers then."""
        self._calls.append(calls)
        self.before.put(rectangle.taken[rectangle.kept], hidden[rectangle.kept.to(hidden.device)])

    def compute(self, layer: int) -> None:
        """Call a layer, whose parameters are bound, on all rectangles."""
        for rectangle, calls in zip(self._layout.rectangles, self._calls, strict=True):
            states = self.stock.layer(layer, self.before.take(rectangle.taken), calls[layer])
            self.after.put(rectangle.taken[rectangle.kept], states[rectangle.kept.to(states.device)])

    def all_rows(self) -> Iterator[torch.Tensor]:
        """Every row of the tables once, a rectangle's at a time."""
        for rectangle in self._layout.rectangles:
            yield rectangle.taken[rectangle.kept]

    def step(self) -> None:
        """Go on to the next stage."""
        self.before, self.after = self.after, self.before
