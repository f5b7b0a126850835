"""Splits texts into passes over the weights, by the available memory (pure)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.planning.limits import Limits
from engine.planning.planner import Plan
from engine.verification.text import Text

_INDEX_BYTES = 12
"""The bytes per token of a decode step's context: its row number, and its mask."""


@dataclass(frozen=True)
class PassLimits:
    """What a pass over the weights may keep in memory."""

    num_rows: int
    """The number of rows of hidden states, of each chain."""
    kept_bytes: int
    """The bytes of masks and indices of all texts."""
    on_device: bool
    """Whether hidden states are stored on the device."""


def pass_limits(plan: Plan, limits: Limits, num_tables: int, kept_width: float) -> PassLimits:
    """The part of the plan's memory that a pass may use, whose hidden states fill `num_tables` tables.

    kept_width: the size of a token's keys and values in a layer, relative to its hidden state; those of shared prefixes
    are kept while a layer is computed. Texts are counted whole, and at least two share a prefix: rows that only one of
    them fills leave space for them. Logits are computed after the layers, and leave their memory to masks until then.
    """
    share, rows = plan.activations, limits.rows_per_sweep
    if share.disk > 0:  # the host holds no more of them than what is on its way to the disk
        rows = min(rows, 4 * limits.rows_per_batch)
    return PassLimits(max(1, int(rows / max(num_tables, kept_width))), 2 * limits.logits_bytes, share.gpu >= 100)


def passes(texts: Sequence[Text], limits: PassLimits, item_bytes: int, window: int | None) -> Iterator[list[int]]:
    """The positions of the texts of each pass, in order: as many as the limits allow, at least one.

    item_bytes: the bytes of a number of the model, which masks consist of.
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
