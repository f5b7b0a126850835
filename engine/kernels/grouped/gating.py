"""What families do with the two numbers that the first product gives for each number of the second: a gate."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gating:
    """One of the gates that our kernel computes, too: gates a and values b of a row become a row of half the width.

    Every step is rounded to the dtype of the row.
    """

    is_interleaved: bool
    """Rows are `[a0, b0, a1, b1, …]`; else `[a0, a1, …, b0, b1, …]`."""
    limit: float = float("inf")
    """Gates are at most this, values at most this far from 0."""
    alpha: float | None = None
    """(b + 1) * a * sigmoid(alpha * a), as in GPT-OSS; None: silu(a) * b."""

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows `[…, 2 * width]` -> `[…, width]`, by torch's functions."""
        gate, value = (rows[..., ::2], rows[..., 1::2]) if self.is_interleaved else rows.chunk(2, dim=-1)
        gate, value = gate.clamp(max=self.limit), value.clamp(min=-self.limit, max=self.limit)
        if self.alpha is None:
            return torch.nn.functional.silu(gate) * value
        return (value + 1) * (gate * torch.sigmoid(gate * self.alpha))
