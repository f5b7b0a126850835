"""What one sweep did and how long it took, for whoever watches an engine (pure)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.schedule.segment import Segment


@dataclass(frozen=True, kw_only=True)
class SweepTiming:
    """One sweep; the host's clock only, read where the engine waits for the device anyway."""

    begun: float
    """`time.perf_counter` when the sweep was begun to be put together."""
    host_s: float
    """Seconds of scheduling before it, drafts of a model included, and of making completions after it."""
    sweep_s: float
    """Seconds of the pass over the layers, to the answers of the last one."""
    load_s: float
    """Those of `sweep_s` in which weights were still being read for the first time."""
    link_s: float
    """Those of `sweep_s`, after loading, in which nothing was computed since weights were on their way."""
    prefill_rows: int
    """Prompt tokens that went through the layers, those of a shared prefix once."""
    decode_rows: int
    """Rows of running sequences: one each, and their drafts."""
    num_sequences: int
    new_tokens: int
    """Tokens that it gave to sequences; ends of text are none."""
    device: str
    """The device that computed it, by the name that torch or, of several, the policy has for it."""


def count_rows(batches: Iterable[Iterable[Segment]]) -> tuple[int, int]:
    """Rows of prompts, and of steps of running sequences, without padding."""
    prefill = decode = 0
    for segments in batches:
        for segment in segments:
            if segment.is_decode:
                decode += segment.num_rows
            else:
                prefill += segment.num_rows
    return prefill, decode
