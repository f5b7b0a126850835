"""The gates that mixture-of-experts families apply between the two products of an expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gating:
    """A gate that our kernel supports: gates a and values b of a row become a row of half the width.

    Every step is rounded to the dtype of the row.
    """

    is_interleaved: bool
    """Whether rows are `[a0, b0, a1, b1, …]` instead of `[a0, a1, …, b0, b1, …]`."""
    limit: float = float("inf")
    """The clamp: gates are at most this, values at most this far from 0; None: no clamp."""
    alpha: float | None = None
    """The factor of GPT-OSS's gate (b + 1) * a * sigmoid(alpha * a); None: silu(a) * b."""

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Apply the gate with torch's functions: rows `[…, 2 * width]` -> `[…, width]`."""
        gate, value = (rows[..., ::2], rows[..., 1::2]) if self.is_interleaved else rows.chunk(2, dim=-1)
        gate, value = gate.clamp(max=self.limit), value.clamp(min=-self.limit, max=self.limit)
        if self.alpha is None:
            return torch.nn.functional.silu(gate) * value
        return (value + 1) * (gate * torch.sigmoid(gate * self.alpha))
