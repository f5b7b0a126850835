"""A small copy whose matrices are random codes, in the format that a model's are packed in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint.model_class import new_model
from engine.errors import UnsupportedError
from flexgen_helm.checking.undecided import UnpackableError

_BLOCK = 8
"""The most rows and columns that share a scale in a copy, whose matrices are small."""
_WEIGHTS = "model.safetensors"


def pack_copy(directory: Path, told: Mapping[str, Any]) -> list[str]:
    """Replace the matrices of a small model that a quantization_config packs by random codes.

    The copy's config describes them, with groups and blocks of sizes that divide its matrices. Decoded codes have the
    magnitude of the replaced numbers. Returns what the packed copy does not do that the model does, in words. Raises
    `UnpackableError` for a format whose codes cannot be generated.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    from flexgen_helm.planning.packed.layouts import layout_of, linear_matrices
    from flexgen_helm.planning.packed.random_codes import RandomCodes

    small, questions = _with_small_groups(told), list[str]()
    if _rounded(small):
        questions.append(
            "the copy's inputs of linear layers are not rounded to a few bits, as the model's are: where one rounding "
            "falls the other way, log-probabilities are farther apart than agreement allows"
        )
    file = directory / "config.json"
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = new_model(config)
    state = load_file(directory / _WEIGHTS)
    try:
        layout = layout_of(small, torch.float32)  # transformers computes experts in the type of their scales
        found = layout.tensors({name: each.shape for name, each in state.items()}, linear_matrices(model))
    except UnsupportedError as error:
        raise UnpackableError(str(error)) from None
    if not found:
        raise UnpackableError("no matrix of the copy is one that the model's quantization_config packs")
    random = RandomCodes()
    for plain, forms in found.items():
        values = state.pop(plain)
        shape = values.mT.shape[-2:] if layout.merged else values.shape
        size = float(values.float().square().mean().sqrt())
        state |= {layout.name_of(plain, part): random.part(part, forms, shape, size) for part in forms}
    save_file(state, directory / _WEIGHTS, metadata={"format": "pt"})
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**settings, "quantization_config": small}), encoding="utf-8")
    return questions


def _rounded(told: dict[str, Any]) -> bool:
    """Take the rounding of inputs out of a quantization_config; whether there was any."""
    groups = [*(told.get("config_groups") or {}).values()]
    found = [bool(group.get("input_activations")) for group in groups]
    for group in groups:
        group["input_activations"] = None
        group["format"] = group.get("format") or told.get("format")  # which the library guesses by the inputs, too
    return any(found)


def _with_small_groups(told: Mapping[str, Any]) -> dict[str, Any]:
    small = json.loads(json.dumps(told, default=str))
    if small.get("weight_block_size"):
        small["weight_block_size"] = [_BLOCK, _BLOCK]
    for group in (small.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        if weights.get("group_size"):
            weights["group_size"] = _BLOCK
    return dict(small)
