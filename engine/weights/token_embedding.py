"""The token embedding, of which only the rows of the current tokens are copied to the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from engine.memory import accelerator
from engine.memory.arena import Arena
from engine.memory.disk.io import wait_for
from engine.model.causal_model import CausalModel
from engine.model.stub import is_same
from engine.weights.placed_unit import PlacedUnit

_UNDER_WAY = 2
"""The most copies of looked up rows that the device has not made yet: each holds tens of megabytes page-locked."""


class TokenEmbedding:
    """Looks up rows of a placed embedding, one micro-batch ahead.

    Where all of it is on the device, the model's own module does it. Otherwise the module's weights are the rows that
    were found, and it is called with their row numbers.
    """

    def __init__(
        self, model: CausalModel, table: PlacedUnit, arena: Arena, wait_for_unit: Callable[[PlacedUnit], None]
    ) -> None:
        self._model = model
        self._table = table
        self._arena = arena
        self._device = arena.device
        self._wait_for = wait_for_unit
        self._has_streams = accelerator.has_streams(arena.device)
        self._looker = ThreadPoolExecutor(
            1, thread_name_prefix="flexgen-look-up", initializer=accelerator.make_current, initargs=(arena.device,)
        )
        self._ahead: tuple[torch.Tensor, Future[tuple[torch.Tensor, torch.Tensor]]] | None = None
        self._copies: deque[Any] = deque()
        """The events of copies that may be under way."""
        self._ids = self._index = torch.empty(0, dtype=torch.long)
        self._rows = torch.empty(0)
        if table.num_streamed:
            embedding: Any = model.embedding
            embedding.padding_idx = None  # only gradients know it, and it may lie beyond the rows looked up
            embedding.register_forward_pre_hook(self._before)
            embedding.register_forward_hook(self._after)
            self._after(embedding)

    def look_up_ahead(self, ids: torch.Tensor) -> None:
        """Start looking up the ids of the next `look_up` call, while the device computes."""
        if self._table.num_streamed:
            self._ahead = ids, self._looker.submit(self._find, ids)

    def look_up(self, ids: torch.Tensor) -> None:
        """Prepare the module for `ids` `[sequences, rows]` (on the host)."""
        if self._table.num_streamed == 0:
            self._wait_for(self._table)
            return
        ahead, self._ahead = self._ahead, None
        self._ids = ids
        self._rows, self._index = ahead[1].result() if ahead is not None and ahead[0] is ids else self._find(ids)

    def _before(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Replace the module's weights by the rows that were looked up, and its ids by their row numbers."""
        asked = args[0]
        if "forward" in module.__dict__:  # another one's, which needs no weights
            return None
        rows, index = self._rows, self._index
        given = self._model.outer.asked
        if given is None or not is_same(asked, given):  # the model's forward has made other ids of those
            ids = asked.cpu()
            if not torch.equal(ids, self._ids):
                rows, index = self._find(ids)
        module._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
        return index, *args[1:]

    def _after(self, module: nn.Module, *_: Any) -> None:
        """Make other readers of the table fail, instead of reading other tokens' rows."""
        like = self._model.state[self._table.extents[0].name]
        nothing = torch.full((), torch.nan, dtype=like.dtype, device=self._device).expand(like.shape)
        module._parameters["weight"] = nn.Parameter(nothing, requires_grad=False)

    def _find(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of the token embedding that `ids` need, on the device, and each id's row number among them."""
        table = self._table
        self._wait_for(table)
        while len(self._copies) >= _UNDER_WAY:
            self._copies.popleft().synchronize()
        unique, inverse = torch.unique(ids, return_inverse=True)
        like = self._model.state[table.extents[0].name]
        rows = torch.empty(len(unique), like.shape[1], dtype=like.dtype, device=self._device)
        row_bytes = like.shape[1] * like.element_size()
        for tier, first, end in table.tiers():
            here = ((unique >= first // row_bytes) & (unique < end // row_bytes)).nonzero()[:, 0]
            if len(here):
                if tier == "disk":
                    found = self._rows_on_disk(unique[here].tolist(), row_bytes).view(like.dtype)
                else:
                    part = table.parts[tier].view(like.dtype).view(-1, like.shape[1])
                    found = self._rows_of(part, unique[here] - first // row_bytes)
                if len(here) == len(rows):
                    rows.copy_(found, non_blocking=True)
                else:
                    rows.index_copy_(0, accelerator.sent(here, self._device), found.to(self._device, non_blocking=True))
        index = accelerator.sent(inverse, self._device)
        if self._has_streams:
            self._copies.append(accelerator.current_stream(self._device).record_event())
        return rows, index

    def _rows_of(self, part: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Rows of the table, page-locked if they are to be copied to a GPU."""
        if part.device.type != "cpu" or not self._has_streams:
            return part.index_select(0, index.to(part.device))
        rows = accelerator.page_locked(len(index), part.shape[1], dtype=part.dtype)
        return torch.index_select(part, 0, index, out=rows)

    def _rows_on_disk(self, rows: list[int], row_bytes: int) -> torch.Tensor:
        """The bytes `[rows, row_bytes]` of rows of the table."""
        found = accelerator.transit(self._device, len(rows) * row_bytes)
        (place,) = self._table.places.values()
        spans = [
            place.span(row * row_bytes, (row + 1) * row_bytes, number * row_bytes) for number, row in enumerate(rows)
        ]
        wait_for(self._arena.io.read(spans, found))
        return found.view(-1, row_bytes)

    def close(self) -> None:
        """Wait until nothing is being looked up."""
        self._looker.shutdown(wait=True, cancel_futures=True)
        self._ahead = None
