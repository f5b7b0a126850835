"""What a layer keeps of one token (pure)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KVShape:
    """Keys and values of one token in one layer, and its index key."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    index_width: int = 0
    """Elements of its index key, by which a layer chooses the keys that it attends to; 0 where it attends to all."""

    @classmethod
    def none(cls) -> KVShape:
        """Of a layer that keeps neither."""
        return cls(0, 0, 0, 0)

    @property
    def key_width(self) -> int:
        """Elements of a token's keys."""
        return self.key_heads * self.key_dim

    @property
    def parts(self) -> tuple[int, int, int]:
        """Elements of a token's keys, of its values, and of its index key."""
        return self.key_width, self.value_heads * self.value_dim, self.index_width

    @property
    def width(self) -> int:
        """Elements of what is kept of a token: a row of the KV cache."""
        return sum(self.parts)
