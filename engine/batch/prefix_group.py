"""Neighbouring rows of a micro-batch whose prefixes are attended to in one call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from engine.batch.context_group import borders
from engine.schedule.sequence import Prefix

Chain = tuple[int, int, tuple[Prefix, ...]]
"""First row, end row, and the prefixes that these rows continue."""


@dataclass(frozen=True, eq=False)
class PrefixGroup:
    """Neighbouring chains of prefixes: the rows of each attend to the whole of theirs, and to no other."""

    first: int
    end: int
    """Rows of the micro-batch, padding included."""
    chains: tuple[tuple[Prefix, ...], ...]
    row_borders: torch.Tensor
    """Where the rows of each chain begin, counted from the first: int32 `[chains + 1]`."""
    prefix_borders: torch.Tensor
    """Where the tokens of each chain begin, one chain behind the other: int32 `[chains + 1]`."""
    longest: int
    """Rows of the chain that most continue."""
    longest_prefix: int
    """Tokens of the longest chain."""


def prefix_groups(chains: Iterable[Chain], device: torch.device, most_tokens: int) -> list[PrefixGroup]:
    """Groups of chains that follow each other without a gap; of several chains none has more than `most_tokens`.

    Attention collects the keys and values of a group's chains.
    """
    groups: list[list[Chain]] = []
    collected = 0
    for chain in chains:
        size = _length(chain)
        if not groups or groups[-1][-1][1] != chain[0] or collected + size > most_tokens:
            groups.append([])
            collected = 0
        groups[-1].append(chain)
        collected += size
    return [_group(group, device) for group in groups]


def _group(chains: list[Chain], device: torch.device) -> PrefixGroup:
    rows = [end - first for first, end, _ in chains]
    tokens = [_length(chain) for chain in chains]
    return PrefixGroup(
        first=chains[0][0],
        end=chains[-1][1],
        chains=tuple(prefixes for _, _, prefixes in chains),
        row_borders=borders(rows, device),
        prefix_borders=borders(tokens, device),
        longest=max(rows),
        longest_prefix=max(tokens),
    )


def _length(chain: Chain) -> int:
    return sum(len(prefix.tokens) for prefix in chain[2])
