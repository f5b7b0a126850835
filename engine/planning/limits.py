"""How large sweeps and micro-batches may be, and the sizes of the buffers between tiers (pure)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.planning.admission import Admission
from engine.policy import PadMode

LOGITS_BYTES = 128 << 20
"""Most of one chunk of float32 logits."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How large sweeps and micro-batches may be."""

    sequences_per_batch: int
    batches: int
    rows_per_batch: int
    """Rows (tokens, padding included) in a micro-batch; a single longer prompt still gets one of its own."""
    rows_per_piece: int | None = None
    """Rows of a prompt or prefix that are computed at once, where it can be computed in pieces; None: all of it."""
    cached_rows_per_batch: int
    """Rows of the KV cache that attention may gather for decode steps at once, and that a rectangle may have."""
    reads_in_place: bool = False
    """Attention reads keys and values of decode steps where they lie on the device, instead of gathering them."""
    reads_on_host: bool = False
    """Attention reads the host's keys and values of decode steps where they lie, on the host."""
    gap_rows: int = 0
    """Largest gap between two cache blocks, in rows, that is cheaper to copy along than to split the transfer."""
    rows_per_sweep: int
    """Rows whose hidden states the activation memory holds."""
    free_rows: int = 0
    """Rows of a sweep that cost next to nothing beside the transfer of the weights: so many may be drafts."""
    replays: bool = False
    """Sweeps of decode steps that lie on the device are replayed as they were recorded: they draft nothing, and prompts
    wait some of them to come in together."""
    admission: Admission | None = None
    """How many rows of prompts that will decode a sweep lets in; None for as many as it has room for."""
    rows_between_fetches: int | None = None
    """Rows of prompts that are computed between decode steps whose keys and values come from another tier, so that
    those come meanwhile; None where they do not come beside the computation."""
    waiting_rows: int = 0
    """Rows of micro-batches that wait for each other where a layer computes experts, so that these are expanded once
    for all; 0: none waits."""
    most_states: int = 0
    """Sequences whose states a layer takes on at once; 0: no layer keeps a state."""
    continues: bool = True
    """Several tokens can be computed from the state behind a prefix; else nothing is shared, nor cut into pieces."""
    pad: PadMode = None
    rectangular: bool = False
    """Micro-batches are rectangles, for families that carry their own attention."""
    logits_bytes: int = LOGITS_BYTES
    """Of one chunk of float32 logits; sampling holds a few such at once."""
    scores_per_batch: int | None = None
    """Attention scores, in new rows times keys, that a rectangle may have; a sequence with more of its own fails."""

    @property
    def seats(self) -> int:
        """Sequences that run at once, at most."""
        return self.sequences_per_batch * self.batches

    @property
    def most_prefixes(self) -> float:
        """New prefixes in a micro-batch: their states are held until those behind them have begun in a layer."""
        return self.most_states or math.inf


WAITING_BATCHES = 16
"""Most micro-batches that wait for each other; each has a thread."""

SLOTS = 2
"""Device memory that layers pass through in turn: one is computed with, and one is filled."""

GATHER_SLOTS = 3
"""The same where a layer's parts are gathered: while that is done, this engine's part of the next one comes."""


STAGING_BUFFERS = 4
"""For offloaded keys and values: one is computed with, two are full, and one is filled. The link is not idle while
other work is computed."""


READ_AHEAD_BYTES = 256 << 20
"""Staging memory for what the sweep reads of weights on disk: an eighth of a second of a fast disk."""

_ROWS = {"cpu": (1024, 512, 256, 128, 64), "other": (8192, 4096, 2048, 1024, 512, 256, 128, 64)}
_MORE_ROWS = (32768, 16384)
"""For small layers on an accelerator, whose micro-batches else end before the host has asked for the next."""
_MOST_OPERATIONS = 1e12
"""On the rows of such a micro-batch, in a layer: 1.5 ms of a fast card, about what a host needs to ask for it."""
LEAST_BATCH_ROWS, SMALL_BATCH_ROWS = _ROWS["cpu"][-1], _ROWS["cpu"][-2]
"""Rows of the smallest micro-batch that a plan is made for, and of the one that a greedy plan leaves room for."""
_TILE_ROWS = 128
"""Of a product that one multiprocessor computes at a time, beside 256 columns (cuBLAS on Hopper)."""
_SIDE_BY_SIDE = 4
"""Tiles of a product with 1,024 columns: most matrices of weights have a multiple of that."""
_RANGE = 0.1
"""How far from what was asked for, at most."""


def batch_rows(on_cpu: bool, row_operations: float | None, multiprocessors: int) -> list[int]:
    """Rows that a micro-batch may have, the most first.

    row_operations: on a row in a layer, where all layers are resident; None where they are not.
    """
    choices = _ROWS["cpu" if on_cpu else "other"]
    if row_operations is not None and not on_cpu:
        choices = (*(rows for rows in _MORE_ROWS if rows * row_operations <= _MOST_OPERATIONS), *choices)
    return [even_rows(rows, multiprocessors) for rows in choices]


def even_rows(rows: int, multiprocessors: int) -> int:
    """The number of rows nearest to `rows` whose tiles come out even on so many multiprocessors.

    `rows` itself where there is none within a tenth of it, or the multiprocessors are not known (0). A product takes as
    long as the multiprocessor with most tiles: on an H200's 132, 4,096 rows take as long as 4,224 do.
    """
    if not multiprocessors:
        return rows
    most = int(rows * (1 + _RANGE)) // _TILE_ROWS
    least = -(-int(rows * (1 - _RANGE)) // _TILE_ROWS)
    even = [tiles for tiles in range(least, most + 1) if tiles * _SIDE_BY_SIDE % multiprocessors == 0]
    nearest = min(even, key=lambda tiles: abs(tiles * _TILE_ROWS - rows), default=None)
    return rows if nearest is None else nearest * _TILE_ROWS
