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


RECORDED_ROWS = 256
"""Whose temporaries recordings of decode steps keep: of the largest micro-batch, but for policies with larger ones."""
RECORDED_BYTES = 64 << 20
"""Beside their rows: the workspace of products (32 MB on an H100), and pieces that torch cannot use again."""
