"""Chooses the consecutive layers of each pipeline stage (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from engine.errors import ConfigError


def cut_layers(layer_bytes: Sequence[int], head_bytes: int, count: int) -> list[range]:
    """Divide the layers into `count` consecutive stages, such that the largest stage has as few bytes as possible.

    A layer's bytes are roughly proportional to its time and memory. The last stage also has the head. Raises
    `ConfigError` if there are fewer layers than stages.
    """
    if count > len(layer_bytes):
        raise ConfigError(f"stages: {count} are more than the model's {len(layer_bytes)} layers; set at most as many")
    ends = [0, *accumulate(layer_bytes)]
    total = len(layer_bytes)
    # least[first]: bytes of the largest of `number` stages over the layers from `first` on, and where they are cut.
    least: dict[int, tuple[int, tuple[int, ...]]] = {
        first: (ends[total] - ends[first] + head_bytes, (total,)) for first in range(total)
    }
    for number in range(2, count + 1):
        least = {
            first: min(
                (max(ends[end] - ends[first], least[end][0]), (end, *least[end][1]))
                for end in range(first + 1, total - number + 2)
            )
            for first in range(total - number + 1)
        }
    borders = (0, *least[0][1])
    return [range(first, end) for first, end in pairwise(borders)]
