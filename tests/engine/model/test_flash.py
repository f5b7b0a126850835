"""Protects: attention by FlashAttention's kernels asks them for the right rows, wherever prefixes and own tokens lie.

The kernel is played by torch's functions on the CPU, as its signature says.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
from parity import JOBS, POLICIES
from torch import Tensor
from transformers import PreTrainedModel

from engine import Engine
from engine.batch.prefix_group import prefix_groups
from engine.model.attention import context_flash, flash, interface
from engine.schedule.sequence import Prefix


class Kernel:
    """FlashAttention: parts of the queries against parts of the keys; of those that do not meet, nothing is read."""

    def __init__(self) -> None:
        self.parts: list[int] = []
        """Of each call over prefixes, how many there were."""
        self.windows: set[int | None] = set()

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_borders: Tensor | None,
        key_borders: Tensor | None,
        longest: int,
        longest_key: int,
        dropout: float,
        is_causal: bool,
        is_debug: bool,
        *,
        scale: float,
        seqused_k: Tensor | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert (dropout, is_debug) == (0.0, False)
        assert window_size_right in (None, 0)
        self.windows.add(window_size_left)
        if query_borders is None or key_borders is None:
            self.parts.append(len(query))
            made = [_attended(*each, is_causal, scale) for each in zip(query, key, value, strict=True)]
            return torch.stack([output for output, _ in made]), torch.stack([sums for _, sums in made])
        assert query_borders.dtype == key_borders.dtype == torch.int32
        if query_borders is not key_borders and seqused_k is None:
            self.parts.append(len(query_borders) - 1)
        rows = list(pairwise(query_borders.tolist()))
        firsts = key_borders.tolist()
        ends = firsts[1:] if seqused_k is None else [a + n for a, n in zip(firsts, seqused_k.tolist(), strict=False)]
        assert longest >= max(b - a for a, b in rows)
        assert longest_key >= max(b - a for a, b in zip(firsts, ends, strict=False))
        parts = [
            _attended(query[a:b], key[first:end], value[first:end], is_causal, scale, window_size_left)
            for (a, b), first, end in zip(rows, firsts, ends, strict=False)
        ]
        assert rows[-1][1] == len(query)
        return torch.cat([output for output, _ in parts]), torch.cat([sums for _, sums in parts], dim=1)


def _attended(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, left: int | None = None
) -> tuple[Tensor, Tensor]:
    """`[rows, heads, dim]`, and log-sum-exps `[heads, rows]`; causal mask and window are aligned with the last key."""
    copies = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    if is_causal:
        hidden = torch.ones(len(query), len(key), dtype=torch.bool).triu(len(key) - len(query) + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    if left is not None:
        hidden = torch.ones(len(query), len(key), dtype=torch.bool).tril(len(key) - len(query) - left - 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value), scores.logsumexp(-1)


@pytest.mark.parametrize(
    ("family", "policy"), [("llama", "device"), ("llama", "thirds"), ("llama", "small"), ("gpt-oss", "small")]
)
def test_equals_transformers(
    family: str,
    policy: str,
    build: Callable[[str], Path],
    reference: Callable[[str], PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    kernel = Kernel()
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", kernel)
    for module in (flash, context_flash):
        monkeypatch.setattr(module, "has_kernels", lambda device, dtype, key_dim, value_dim: True)
    monkeypatch.setattr(interface, "BACKENDS", (flash.Flash(), context_flash.ContextFlash()))
    settings: dict[str, Any] = {**POLICIES[policy], "device": "cpu", "offload-dir": str(tmp_path)}
    with Engine.from_pretrained(str(build(family)), policy=settings) as engine:
        done = engine.run(JOBS)
    found, largest = parity.differences(parity.expect(reference(family)), done)
    assert not found
    assert largest < parity.TOLERANCE
    assert max(kernel.parts) > 1  # several prefixes, or contexts, in one call
    assert kernel.windows == ({None, 7} if family == "gpt-oss" else {None})


def prefix(tokens: int, parent: Prefix | None = None) -> Prefix:
    return Prefix(tokens=list(range(tokens)), parent=parent)


def test_chains_are_grouped_while_they_follow_each_other_and_their_tokens_are_few() -> None:
    first, other = prefix(5), prefix(7)
    inner = prefix(2, first)
    chains = [(3, 4, (first,)), (4, 9, (first, inner)), (9, 11, (other,)), (12, 20, (other,))]
    groups = prefix_groups(chains, torch.device("cpu"), 12)
    assert [(group.first, group.end, group.chains) for group in groups] == [
        (3, 9, ((first,), (first, inner))),
        (9, 11, ((other,),)),
        (12, 20, ((other,),)),
    ]
    assert groups[0].row_borders.tolist() == [0, 1, 6]
    assert groups[0].prefix_borders.tolist() == [0, 5, 12]
    assert (groups[0].longest, groups[0].longest_prefix) == (5, 7)
    assert len(prefix_groups(chains, torch.device("cpu"), 19)) == 2
