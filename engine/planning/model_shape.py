"""The sizes of a model that the planner needs (pure)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a model, in bytes of the dtype it runs in."""

    unit_bytes: tuple[int, ...]
    """The bytes of each decoder layer, and of what streams after them (the head)."""
    embedding_bytes: int
    """The bytes of the token embedding; 0 where it is among `unit_bytes` (tied)."""
    outer_bytes: int
    """The bytes of parameters that are needed throughout (norms, position tables) and stay on the device."""
    cache_row_bytes: int
    """The bytes of one token's keys and values in all layers."""
    cache_layer_row_bytes: int
    """The bytes of one token's keys and values in the widest layer."""
    state_bytes: int = 0
    """The bytes of one sequence's states in all layers, whatever its length; 0 where no layer keeps one."""
    state_layer_bytes: int = 0
    """The bytes of one sequence's state in the layer where it is largest."""
    continues: bool = True
    """Whether several tokens can be computed from the state after a prefix."""
    coded_layer_row_bytes: int = 0
    """The bytes of one token's encoded keys and values in the widest layer, on host or disk; 0 without a codec."""
    hidden_row_bytes: int
    handed_row_bytes: int = 0
    """The bytes per row that are kept on the device between layers in addition to the hidden state."""
    work_row_bytes: int
    """The approximate bytes of one row's temporaries inside a layer."""
    cpu_work_row_bytes: int = 0
    """The bytes of one row's temporaries on the CPU, where torch's functions compute experts; 0: as on the device."""

    is_padded: bool = False
    """Whether the family has its own attention and runs in padded micro-batches."""
    is_plain: bool = False
    """Whether attention is a softmax over all earlier tokens: no caps, sinks, windows, nor code of the family's own."""
    reads_in_place: bool = False
    """Whether attention reads keys and values in place on the device."""
    stored_part: float = 1.0
    """Stored size of the layers divided by their size as plain numbers (the compression ratio)."""
    expanded_bytes: int = 0
    """The device memory into which encoded layers are decoded, one after the other, workspace included; 0 if none
    are."""
    least_expanded_bytes: int = 0
    """The same memory where experts are decoded some at a time; equal to `expanded_bytes` without experts."""
    apart_bytes: int = 0
    """The most that a buffer holds at once where experts that are decoded some at a time are also transferred so; 0
    where there are none."""
    waiting_row_bytes: int = 0
    """The bytes per row that a layer waiting for experts holds, and that these take; 0 where none are decoded."""
    score_bytes: int = 0
    """The bytes of one row's attention to one key, all heads and copies, where a family keeps them; else 0."""

    @property
    def is_mixture(self) -> bool:
        """Whether there are experts that the engine's own function computes."""
        return self.cpu_work_row_bytes > 0

    @property
    def weight_bytes(self) -> int:
        """The bytes of all weights."""
        return sum(self.unit_bytes) + self.embedding_bytes + self.outer_bytes
