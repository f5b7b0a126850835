"""Adjacent rows of a micro-batch whose prefixes one attention call takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from engine.batch.context_group import borders
from engine.schedule.sequence import Prefix

Chain = tuple[int, int, tuple[Prefix, ...]]
"""The first row, the end row, and the chain of prefixes that these rows continue."""


@dataclass(frozen=True, eq=False)
class PrefixGroup:
    """Adjacent chains of prefixes: the rows of each chain attend to all of that chain, and to no other."""

    first: int
    end: int
    """The group's end, in rows of the micro-batch, padding included."""
    chains: tuple[tuple[Prefix, ...], ...]
    row_borders: torch.Tensor
    """The start of each chain's rows, counted from the first: int32 `[chains + 1]`."""
    prefix_borders: torch.Tensor
    """The start of each chain's tokens where the chains are concatenated: int32 `[chains + 1]`."""
    longest: int
    """The largest number of rows that continue one chain."""
    longest_prefix: int
    """The number of tokens of the longest chain."""


def prefix_groups(chains: Iterable[Chain], device: torch.device, most_tokens: int) -> list[PrefixGroup]:
    """Group chains that follow each other without a gap; a group of several chains has at most `most_tokens` tokens.

    Attention gathers the keys and values of a group's chains.
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
