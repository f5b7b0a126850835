"""A model's own forward, called without weights: the embedding returns zeros, and stubs replace the layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from engine.model.drivable import Drivable
from engine.model.padded import CacheView, ProbingView


def inputs_of(model: Drivable, positions: torch.Tensor) -> dict[str, Any]:
    """Token 0 at `[sequences, rows]` positions, for a forward whose embedding is replaced."""
    count, rows = positions.shape
    given: dict[str, Any] = {"input_ids": torch.zeros(count, rows, dtype=torch.long)}
    if not model.is_padded:
        return {**given, "position_ids": torch.arange(rows)[None] + positions[:, :1], "use_cache": False}
    mask = torch.ones(count, rows, dtype=torch.long)
    view = CacheView(ProbingView(model.sweeping))
    return {**given, "position_ids": positions, "use_cache": True, "cache": view, "attention_mask": mask}


@contextmanager
def outer_zeros(model: Drivable) -> Iterator[None]:
    """Inside, the parameters outside of layers and head are zeros, which take almost no memory."""
    # The embedding's, too: some forwards read it besides calling it, and make nothing of that for text.
    owners = dict(chain(model.units[0].owners.items(), model.units[1].owners.items()))
    for name, (module, attribute) in owners.items():
        zeros = torch.zeros((), dtype=model.state[name].dtype).expand(model.state[name].shape)
        module._parameters[attribute] = nn.Parameter(zeros, requires_grad=False)
    try:
        width = model.state[model.embedding_name].shape[1]
        with model.embedding_as(lambda ids: torch.zeros(*ids.shape, width, dtype=model.dtype)):
            yield
    finally:
        for name, (module, attribute) in owners.items():
            module._parameters[attribute] = nn.Parameter(model.state[name], requires_grad=False)
