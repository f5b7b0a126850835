"""Protects: attention by FlashAttention's kernels asks them for the right rows, wherever prefixes and own tokens lie.

The kernel is played by torch's functions on the CPU, as its signature says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
from parity import JOBS, POLICIES
from played_flash import Kernel
from transformers import PreTrainedModel

from engine import Engine
from engine.batch.prefix_group import prefix_groups
from engine.model.attention import context_flash, flash, interface
from engine.schedule.sequence import Prefix


@pytest.mark.parametrize(
    ("family", "policy"),
    [("llama", "device"), ("llama", "thirds"), ("llama", "small"), ("gpt-oss", "small"), ("deepseek-v3", "small")],
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
        monkeypatch.setattr(module, "has_kernels", lambda device, dtype, key_dim, value_dim: key_dim == value_dim)
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
