"""Measures how far two computations of the same rows differ, and how much of it rounding explains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.kernels.codec import Codec

TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""The tolerances of a row's difference relative to its scale, by dtype: the effect of another order of sums, and of
another kernel."""
_CODED_TOLERANCES = {8: 2e-2, 4: 1e-1}
"""The tolerances with keys and values, or inputs of matrices, in codes of so many bits: now and then another order
of sums moves a number across the border between two codes, a whole step."""
_REROUTED = 0.01
"""The share of a layer's rows, of each kind, that may differ by more where rounded numbers choose experts, whose
scores nearly tie."""
_FEW_REROUTED = 3
"""The number of rows that may in any case, up to a quarter: one row in 500 is rerouted in bfloat16, and a deep model
has many layers in which it may happen."""
_ROWS = 512
"""Compared at once: it takes five float32 copies of them."""


def tolerance_of(dtype: torch.dtype, cache_codec: Codec | None, *, rounds_inputs: bool) -> float:
    """What rounding may make of a row's difference relative to its scale."""
    bits = [8] * rounds_inputs + ([] if cache_codec is None else [cache_codec.bits])
    return max([TOLERANCES[dtype], *(_CODED_TOLERANCES[each] for each in bits)])


@dataclass(frozen=True, kw_only=True)
class WeightDifference:
    """How far a unit's parameters, as the device computes with them, are from the checkpoint's."""

    parameter: str
    """The one that is farthest from what it should be."""
    largest: float
    """The largest difference of its numbers from those of the checkpoint."""
    is_wrong: bool
    """Whether that is more than its codes explain; of numbers that are not encoded, whether it is any."""


@dataclass(frozen=True, kw_only=True)
class KindOfRows:
    """The rows of a stage that the engine computes in one way."""

    name: str
    """How the engine computes them: "prefix", "prompt", "decode" or, of recorded decode steps, "replayed"."""
    num_rows: int
    num_beyond: int
    """The number of rows whose relative difference is above the tolerance."""

    @property
    def is_rare(self) -> bool:
        """Whether those are few enough to be explained by near ties of experts' scores."""
        few = min(_FEW_REROUTED, self.num_rows // 4)
        return self.num_beyond <= max(_REROUTED * self.num_rows, few)


@dataclass(frozen=True, kw_only=True)
class StageDifference:
    """The difference of a stage (the embedding, a layer, the head) computed by both from the same input."""

    name: str
    """"embedding", "layer N" or "head"."""
    largest: float
    """The largest absolute difference of a number."""
    relative: float
    """The largest difference of a row, relative to its scale (`Meter`)."""
    relative_within: float
    """The largest relative difference among the rows within the tolerance."""
    num_rows: int
    num_beyond: int
    """The number of rows whose relative difference is above the tolerance."""
    kinds: tuple[KindOfRows, ...] = ()
    """The same rows by how the engine computes them; empty for the head, whose rows are computed in one way."""
    may_reroute: bool = False
    """Whether rounding alone may have sent rows to other experts: the stage has a router with 16-bit numbers."""
    weights: WeightDifference | None = None
    """The comparison of the weights; None where they were not compared with the checkpoint."""
    compression: float | None = None
    """The effect of compression after this stage: the root mean square of the difference between hidden states and
    those of uncompressed weights and cache, relative to the latter's. None where nothing is compressed, or the
    checkpoint has no other numbers."""

    @property
    def is_within(self) -> bool:
        """Whether rounding explains the difference, and the weights are right.

        A row that was sent to another expert may differ by any finite amount, since two experts are unrelated. So only
        few rows of each kind may, and a fault of a whole kind is seen however few its rows are.
        """
        if self.weights is not None and self.weights.is_wrong:
            return False
        if self.num_beyond == 0:
            return True
        is_rare = all(kind.is_rare for kind in self.kinds)
        return self.may_reroute and bool(self.kinds) and is_rare and math.isfinite(self.relative)

    @property
    def num_excused(self) -> int:
        """The number of rows above the tolerance that are explained by a choice of other experts."""
        return self.num_beyond if self.is_within else 0


class Meter:
    """Accumulates differences of rows `[rows, width]` that two computations made of the same input.

    A row's scale is, for each number, its magnitude plus the root mean square of what the stage added to the row; a
    row's difference is the root mean square of the numbers' differences, each relative to its scale. So neither do a
    few large numbers that pass a layer unchanged hide its errors, nor does their rounding count as one.
    """

    def __init__(self, tolerance: float, device: torch.device, kinds: Sequence[str] = ()) -> None:
        """kinds: the names of the kinds of rows to distinguish; empty where there is one."""
        self._tolerance = tolerance
        self._kinds = kinds
        self._largest = torch.zeros((), device=device)
        self._relative = torch.zeros((), device=device)
        self._within = torch.zeros((), device=device)
        self._num_rows, self._num_beyond = torch.zeros(2, max(1, len(kinds)), dtype=torch.long, device=device)

    def add(
        self,
        ours: torch.Tensor,
        theirs: torch.Tensor,
        before: torch.Tensor | None = None,
        kinds: torch.Tensor | None = None,
    ) -> None:
        """Add rows of both, and the stage's input; None where nothing passes it unchanged.

        kinds: the kind of each row by its number, int64 `[rows]`; None where all are of the first.
        """
        if kinds is None:
            kinds = torch.zeros(len(ours), dtype=torch.long)
        kinds = kinds.to(ours.device)
        self._num_rows.index_add_(0, kinds, torch.ones_like(kinds))
        for first in range(0, len(ours), _ROWS):
            rows = slice(first, first + _ROWS)
            one, other = ours[rows].float(), theirs[rows].float()
            added = other if before is None else other - before[rows].float()
            scale = added.pow(2).mean(-1, keepdim=True).sqrt() + other.abs()
            is_same = (one == other) | (one.isnan() & other.isnan())
            apart = torch.where(is_same, 0.0, (one - other).abs())
            relative = (apart / scale.clamp_min(1e-30)).pow(2).mean(-1).sqrt().nan_to_num(nan=torch.inf)
            self._largest = torch.maximum(self._largest, apart.nan_to_num(nan=torch.inf).max())
            self._relative = torch.maximum(self._relative, relative.max())
            is_beyond = relative > self._tolerance
            self._within = torch.maximum(self._within, relative.masked_fill(is_beyond, 0.0).max())
            self._num_beyond.index_add_(0, kinds[rows], is_beyond.long())

    def stage(self, name: str, *, may_reroute: bool = False) -> StageDifference:
        """The result; waits for the device."""
        num_rows, num_beyond = self._num_rows.tolist(), self._num_beyond.tolist()
        return StageDifference(
            name=name,
            largest=float(self._largest),
            relative=float(self._relative),
            relative_within=float(self._within),
            num_rows=sum(num_rows),
            num_beyond=sum(num_beyond),
            kinds=tuple(
                KindOfRows(name=kind, num_rows=rows, num_beyond=beyond)
                for kind, rows, beyond in zip(self._kinds, num_rows, num_beyond, strict=False)
            ),
            may_reroute=may_reroute,
        )


class RootMeanSquare:
    """The root mean square of differences, relative to the values."""

    def __init__(self, device: torch.device) -> None:
        self._apart = torch.zeros((), dtype=torch.float64, device=device)
        self._size = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Add rows of both."""
        for first in range(0, len(ours), _ROWS):
            one, other = ours[first : first + _ROWS].float(), theirs[first : first + _ROWS].float()
            self._apart += (one - other).pow(2).sum()
            self._size += other.pow(2).sum()

    def relative(self) -> float:
        """The root mean square of the differences, relative to that of `theirs`; waits for the device."""
        return float((self._apart / self._size.clamp_min(1e-300)).sqrt())
