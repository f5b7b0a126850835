"""What one sweep did and how long it took, for observers of an engine (pure)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.schedule.segment import Segment


@dataclass(frozen=True, kw_only=True)
class SweepTiming:
    """The timing of one sweep, by the host's clock, read where the engine waits for the device anyway."""

    begun: float
    """`time.perf_counter` when the sweep's scheduling began."""
    host_s: float
    """The seconds of scheduling before it, drafts by a model included, and of making completions after it."""
    sweep_s: float
    """The seconds of the pass over the layers, up to the last answers."""
    load_s: float
    """The seconds of `sweep_s` in which weights were still being read for the first time."""
    link_s: float
    """The seconds of `sweep_s`, after loading, in which the computation waited for weights."""
    prefill_rows: int
    """The number of prompt tokens that passed through the layers; those of a shared prefix count once."""
    decode_rows: int
    """The number of rows of running sequences: one each, and their drafts."""
    num_sequences: int
    new_tokens: int
    """The number of tokens that it added to sequences, without end-of-text."""
    device: str
    """The name of the device that computed it, as torch or, with several, the policy names it."""


def count_rows(batches: Iterable[Iterable[Segment]]) -> tuple[int, int]:
    """Count the rows of prompts, and of steps of running sequences, without padding."""
    prefill = decode = 0
    for segments in batches:
        for segment in segments:
            if segment.is_decode:
                decode += segment.num_rows
            else:
                prefill += segment.num_rows
    return prefill, decode
