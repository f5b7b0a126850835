"""What a layer keeps of one token (pure)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KVShape:
    """Keys and values of one token in one layer."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int

    @classmethod
    def none(cls) -> KVShape:
        """Of a layer that keeps neither."""
        return cls(0, 0, 0, 0)

    @property
    def key_width(self) -> int:
        """Elements of a token's keys."""
        return self.key_heads * self.key_dim

    @property
    def width(self) -> int:
        """Elements of a token's keys and values: a row of the KV cache."""
        return self.key_width + self.value_heads * self.value_dim
