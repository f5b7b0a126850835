"""Texts that are compared while the weights pass once, by what memory holds of them (pure)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.planning.limits import Limits
from engine.planning.planner import Plan
from engine.verification.text import Text

_INDEX_BYTES = 12
"""Of a decode step's context, for each of its tokens: where it lies, and its mask."""


@dataclass(frozen=True)
class PassLimits:
    """What a pass over the weights may keep."""

    num_rows: int
    """Rows of hidden states, of each chain."""
    kept_bytes: int
    """Masks and indices of all texts."""
    on_device: bool
    """Whether hidden states are kept on the device."""


def pass_limits(plan: Plan, limits: Limits, num_tables: int, kept_width: float) -> PassLimits:
    """What of the plan's memory a pass may take, whose hidden states fill `num_tables` tables.

    kept_width: of a token's keys and values in a layer, relative to its hidden state; those of shared prefixes are kept
    while a layer is computed. Texts are counted whole, and two at least share a prefix: rows that only one of them
    fills leave room for them. Logits are computed behind the layers, and leave their memory to masks until then.
    """
    share, rows = plan.activations, limits.rows_per_sweep
    if share.disk > 0:  # the host holds no more of them than what is on its way to the disk
        rows = min(rows, 4 * limits.rows_per_batch)
    return PassLimits(max(1, int(rows / max(num_tables, kept_width))), 2 * limits.logits_bytes, share.gpu >= 100)


def passes(texts: Sequence[Text], limits: PassLimits, item_bytes: int, window: int | None) -> Iterator[list[int]]:
    """The positions of the texts of each pass: in their order, as many as the limits allow, one at least.

    item_bytes: of a number of the model, which masks are made of.
    """
    taken: list[int] = []
    rows = kept = 0
    for index, text in enumerate(texts):
        length = len(text.fed(window))
        size = length * length * item_bytes + len(text.known) * length * _INDEX_BYTES
        if taken and (rows + length > limits.num_rows or kept + size > limits.kept_bytes):
            yield taken
            taken, rows, kept = [], 0, 0
        taken.append(index)
        rows, kept = rows + length, kept + size
    if taken:
        yield taken
