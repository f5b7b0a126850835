"""What a layer keeps of one token (pure)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KVShape:
    """The size of the keys, the values and the index key of one token in one layer."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    index_width: int = 0
    """The number of elements of its index key, by which a layer chooses the keys to attend to; 0 where it attends to
    all."""

    @classmethod
    def none(cls) -> KVShape:
        """The shape for a layer that keeps neither keys nor values."""
        return cls(0, 0, 0, 0)

    @property
    def key_width(self) -> int:
        """The number of elements of a token's keys."""
        return self.key_heads * self.key_dim

    @property
    def parts(self) -> tuple[int, int, int]:
        """The numbers of elements of a token's keys, of its values, and of its index key."""
        return self.key_width, self.value_heads * self.value_dim, self.index_width

    @property
    def width(self) -> int:
        """The number of elements of a token's row in the KV cache."""
        return sum(self.parts)
