"""The sizes of sweeps and micro-batches, and of the buffers between tiers (pure)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.planning.admission import Admission
from engine.policy import PadMode

LOGITS_BYTES = 128 << 20
"""The most bytes of one chunk of float32 logits."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest sizes of sweeps and micro-batches."""

    sequences_per_batch: int
    batches: int
    rows_per_batch: int
    """The most rows (tokens, padding included) of a micro-batch; a single longer prompt still gets one of its own."""
    rows_per_piece: int | None = None
    """The most rows of a prompt or prefix that are computed at once, where it can be computed in pieces; None: all
    of it."""
    cached_rows_per_batch: int
    """The most rows of the KV cache that attention may gather for decode steps at once, or that a rectangle may
    have."""
    reads_in_place: bool = False
    """Whether attention reads the keys and values of decode steps in place on the device, instead of gathering them."""
    reads_on_host: bool = False
    """Whether attention reads the keys and values of decode steps that are on the host in place, on the host."""
    gap_rows: int = 0
    """Largest gap between two cache blocks, in rows, that is cheaper to copy along than to split the transfer."""
    rows_per_sweep: int
    """The number of rows whose hidden states the activation memory holds."""
    free_rows: int = 0
    """The number of rows of a sweep that cost next to nothing during the transfer of the weights: so many may be
    drafts."""
    replays: bool = False
    """Whether sweeps of decode steps on the device are replayed from recordings: they draft nothing, and prompts
    wait for others to enter together."""
    admission: Admission | None = None
    """How many rows of prompts that will decode a sweep admits; None for as many as it has space for."""
    rows_between_fetches: int | None = None
    """The rows of prompts that are computed between decode steps whose keys and values come from another tier, to
    overlap the transfer; None where transfers do not overlap with the computation."""
    waiting_rows: int = 0
    """The most rows of micro-batches that wait for each other where a layer computes experts, so that these are
    decoded once for all; 0: none waits."""
    most_states: int = 0
    """The most sequences whose states a layer updates at once; 0: no layer keeps a state."""
    continues: bool = True
    """Whether several tokens can be computed from the state after a prefix; otherwise nothing is shared, nor cut
    into pieces."""
    pad: PadMode = None
    rectangular: bool = False
    """Whether micro-batches are rectangles, for families with their own attention."""
    logits_bytes: int = LOGITS_BYTES
    """The bytes of one chunk of float32 logits; sampling holds a few chunks at once."""
    scores_per_batch: int | None = None
    """The most attention scores (new rows times keys) of a rectangle; a sequence that needs more on its own fails."""

    @property
    def seats(self) -> int:
        """The most sequences that run at once."""
        return self.sequences_per_batch * self.batches

    @property
    def most_prefixes(self) -> float:
        """The most new prefixes in a micro-batch: their states are held until the spans after them begin in a layer."""
        return self.most_states or math.inf


WAITING_BATCHES = 16
"""The most micro-batches that wait for each other; each has a thread."""

SLOTS = 2
"""The number of device buffers for layers: one is in use while the other is filled."""

GATHER_SLOTS = 3
"""The number of such buffers where a layer's parts are gathered: meanwhile this engine's part of the next one
arrives."""


STAGING_BUFFERS = 4
"""The number of staging buffers for offloaded keys and values: one is in use, two are full, and one is being filled.
So the link stays busy while other work is computed."""


READ_AHEAD_BYTES = 256 << 20
"""The staging memory for weights that a sweep reads from disk: an eighth of a second of a fast disk."""


RECORDED_ROWS = 256
"""The rows for whose temporaries recordings of decode steps keep memory: those of the largest micro-batch, except
for policies with larger ones."""
RECORDED_BYTES = 64 << 20
"""The memory of recordings in addition to their rows: the workspace of products (32 MB on an H100), and fragments
that torch cannot reuse."""
