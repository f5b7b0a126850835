"""New spans of a micro-batch that one attention call serves, and their mask."""

from __future__ import annotations

import torch

from engine.batch.reach import Reach
from engine.memory import accelerator
from engine.schedule.segment import Segment
from engine.schedule.sequence import Prefix


class PrefillGroup:
    """Adjacent segments of new spans that continue the same chain of prefixes (or none)."""

    def __init__(self, segments: list[Segment], device: torch.device, chain: tuple[Prefix, ...]) -> None:
        self.chain = chain
        """The prefixes that its mask covers, in addition to own tokens."""
        self.first, self.end = segments[0].first, segments[-1].end
        sizes = {segment.end - segment.first for segment in segments}
        self.num_parts = 1 if self.chain or len(sizes) > 1 else len(segments)
        """The number of parts of equal length that do not attend to each other; in a single part, the mask ensures
        that."""
        self._device = device
        self._segments = segments if self.num_parts == 1 else segments[:1]
        self.is_causal = not self.chain and len(self._segments) == 1
        """Whether its mask hides later rows only."""
        self._masks: dict[tuple[Reach, torch.dtype, int], torch.Tensor] = {}

    def mask(self, reach: Reach, dtype: torch.dtype, copies: int) -> torch.Tensor:
        """The additive mask of a part, 0 or -inf: `[copies * rows, prefix + rows]`, one copy per query group."""
        key = reach, dtype, copies
        if key not in self._masks:
            self._masks[key] = self._make_mask(reach, dtype).repeat(copies, 1)
        return self._masks[key]

    def _make_mask(self, reach: Reach, dtype: torch.dtype) -> torch.Tensor:
        # Order counts padding on, so that real rows, which come first, never see it.
        start = sum(len(prefix.tokens) for prefix in self.chain)
        sizes = [segment.num_rows + segment.num_pad for segment in self._segments]
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        order = torch.cat([torch.arange(start, start + size) for size in sizes])
        key_owner = torch.cat((torch.full((start,), -1), owner))
        key_order = torch.cat((torch.arange(start), order))
        seen = ((key_owner == -1) | (key_owner == owner[:, None])) & reach.sees(order[:, None], key_order)
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
        return accelerator.sent(mask, self._device)
