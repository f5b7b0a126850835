"""Hidden states that stock layers compute from stage to stage, each token of a shared prefix once."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.model.stock import StockForward
from engine.model.stock_cache import KeysAndValues
from engine.model.stub import LayerCall
from engine.verification.layout import Layout, Rectangle


class Table:
    """Hidden states of a pass, `[rows, width]`, on the device or on the host.

    Rows are selected by int64 `[count]` on the table's device: on the GPU, neither `take` nor `put` waits.
    """

    def __init__(self, num_rows: int, width: int, dtype: torch.dtype, device: torch.device, home: torch.device) -> None:
        """home: the device that stores them; they are used on `device`."""
        self._device = device
        self.home = home
        """The device that stores them."""
        self._rows = torch.empty(num_rows, width, dtype=dtype, device=home)

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows, on the device."""
        return self._rows.index_select(0, rows).to(self._device)

    def put(self, rows: torch.Tensor, states: torch.Tensor) -> None:
        """Store states `[count, width]` of rows."""
        self._rows.index_copy_(0, rows, states.to(self.home))


class Chain:
    """The computation of a pass's texts by stock layers, each layer from the output of the one before."""

    def __init__(self, layout: Layout, stock: StockForward, tables: tuple[Table, Table]) -> None:
        self._layout = layout
        self._stock = stock
        self.before, self.after = tables
        """The hidden states that enter the current stage, and those that it computes."""
        self._calls: list[list[LayerCall]] = []

    def embed(self, rectangle: Rectangle) -> None:
        """Store the model's embeddings of the next rectangle, whose ids were looked up, and how it calls layers."""
        ids = rectangle.ids.to(self._stock.device)
        hidden, calls = self._stock.record(ids, rectangle.num_before, is_cached=bool(rectangle.followed))
        self._calls.append(calls)
        self._put(self.before, rectangle, hidden)

    def compute(self, layer: int) -> None:
        """Call a layer, whose parameters are bound, on all rectangles."""
        kept: dict[int, KeysAndValues] = {}
        for rectangle, calls in zip(self._layout.rectangles, self._calls, strict=True):
            before = _joined([kept[number] for number in rectangle.before])
            states, new = self._stock.layer(layer, self.before.take(rectangle.taken), calls[layer], before)
            self._put(self.after, rectangle, states)
            for number, place in rectangle.followed.items():
                assert new is not None
                key, value = (_copied(x[place : place + 1], self.before.home) for x in new)
                kept[number] = key, value

    @staticmethod
    def _put(table: Table, rectangle: Rectangle, states: torch.Tensor) -> None:
        table.put(rectangle.put, states if rectangle.kept is None else states.index_select(0, rectangle.kept))

    def all_rows(self) -> Iterator[torch.Tensor]:
        """Yield every row of the tables once, one rectangle's at a time."""
        for rectangle in self._layout.rectangles:
            yield rectangle.put

    def step(self) -> None:
        """Go on to the next stage."""
        self.before, self.after = self.after, self.before


def _joined(parts: list[KeysAndValues]) -> KeysAndValues | None:
    """Concatenate keys and values of consecutive tokens; None for none."""
    if len(parts) < 2:
        return parts[0] if parts else None
    keys, values = (torch.cat(each, dim=2) for each in zip(*parts, strict=True))
    return keys, values


def _copied(kept: torch.Tensor, home: torch.device) -> torch.Tensor:
    """A copy, so that the memory of which it was a view is released."""
    return kept.clone(memory_format=torch.contiguous_format) if kept.device.type == home.type else kept.to(home)
