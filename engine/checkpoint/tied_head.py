"""Tied parameters: a head that shares the token embedding, unless the weight files have both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from engine.checkpoint.names import CheckpointNames
from engine.checkpoint.tensors import tensors
from engine.checkpoint.weight_files import chosen_name

_CHUNK = 1 << 22


def is_tied(
    path: Path | None, module: PreTrainedModel, names: CheckpointNames, state: Mapping[str, torch.Tensor], head: str
) -> bool:
    """Whether parameter `head` shares another parameter (the token embedding), as in `from_pretrained`.

    It does not where the config says so but the weight files of `path` hold both tables, and they differ in the model's
    dtype: then the config is wrong. Where both are there, they are read until a difference shows. Without a path, the
    config is believed.
    """
    pair = module.all_tied_weights_keys.get(head)
    if pair is None or path is None or chosen_name(path) is None:
        return pair is not None
    found: dict[str, Any] = {}
    for name, load in tensors(path):
        target, pattern = names.target(name)
        if target in (head, pair) and pattern is None:
            found[target] = load
    if len(found) < 2:
        return True
    return _are_equal(found[head](), found[pair](), state[head].dtype)


def twins_of(module: PreTrainedModel, head: str) -> dict[str, list[str]]:
    """Parameters with two names in the model, except its head's weight, by each name: such as a shared bias."""
    found: dict[str, list[str]] = {}
    for one, other in module.all_tied_weights_keys.items():
        if one != head:
            found.setdefault(one, []).append(other)
            found.setdefault(other, []).append(one)
    return found


def _are_equal(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    if one.shape != other.shape:
        return False
    if one.data_ptr() == other.data_ptr() and one.dtype == other.dtype and one.stride() == other.stride():
        return True
    flat, beside = one.reshape(-1), other.reshape(-1)
    for first in range(0, len(flat), _CHUNK):
        if not torch.equal(flat[first : first + _CHUNK].to(dtype), beside[first : first + _CHUNK].to(dtype)):
            return False
    return True
