"""Sizes of a model, as the planner needs them (pure)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a model, in bytes of the dtype it runs in."""

    unit_bytes: tuple[int, ...]
    """Bytes of each decoder layer, and of what streams behind them (the head)."""
    embedding_bytes: int
    """Bytes of the token embedding; 0 where it is among `unit_bytes` (tied)."""
    outer_bytes: int
    """Bytes of what is needed throughout (norms, position tables), which is copied to the device for good."""
    cache_row_bytes: int
    """Bytes of one token's keys and values in all layers."""
    cache_layer_row_bytes: int
    """Bytes of one token's keys and values in the widest layer."""
    state_bytes: int = 0
    """Bytes of one sequence's states in all layers, whatever its length; 0 where no layer keeps one."""
    state_layer_bytes: int = 0
    """Bytes of one sequence's state in the layer where it is largest."""
    continues: bool = True
    """Several tokens can be computed from the state behind a prefix."""
    coded_layer_row_bytes: int = 0
    """Bytes of one token's keys and values in the widest layer off the device, encoded; 0 without a codec."""
    hidden_row_bytes: int
    handed_row_bytes: int = 0
    """What is kept of a row on the device between layers, besides its hidden state."""
    work_row_bytes: int
    """Temporaries of one row inside a layer, about."""
    cpu_work_row_bytes: int = 0
    """The same on the CPU, where torch's functions compute experts; 0: as much."""

    is_padded: bool = False
    """The family carries its own attention and runs in padded micro-batches."""
    is_plain: bool = False
    """Attention is a softmax over all tokens before: no caps, sinks, windows, nor code of the family's own."""
    reads_in_place: bool = False
    """Attention reads keys and values on the device where they lie."""
    stored_part: float = 1.0
    """Stored size of the layers divided by their size as plain numbers (the compression ratio)."""
    expanded_bytes: int = 0
    """Device memory that encoded layers are expanded into, in turn, and what that takes besides; 0 if none are."""
    least_expanded_bytes: int = 0
    """The same where experts are expanded some at a time; as much if there are none."""
    apart_bytes: int = 0
    """The most that passes through a slot at once where experts that are expanded some at a time are brought so, too; 0
    where there are none."""
    waiting_row_bytes: int = 0
    """Of one row, what a layer holds that waits for experts, and what these take; 0 where none are expanded."""
    score_bytes: int = 0
    """Of one row's attention to one key, all heads and their copies, where a family keeps them; else 0."""

    @property
    def is_mixture(self) -> bool:
        """Whether there are experts that the engine's own function computes."""
        return self.cpu_work_row_bytes > 0

    @property
    def weight_bytes(self) -> int:
        """All weights, once."""
        return sum(self.unit_bytes) + self.embedding_bytes + self.outer_bytes
