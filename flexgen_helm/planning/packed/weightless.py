"""Weight files that have a header and no numbers: a packed model is opened by what its checkpoint's header says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.kernels.packed.matrix import PartForm
from engine.model.build import build
from flexgen_helm.planning.packed.layouts import Layout, layout_of, linear_matrices, plain_tensors

_SHARD_BYTES = 4 << 30
_CODES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
}


def write_weightless(folder: Path, config: Mapping[str, Any]) -> None:
    """Write weight files of the packed matrices of a config.json's model: headers, and a hole for the numbers.

    The plain tensors are not in it. Raises `UnsupportedError` for a quantization_config that no codes are made of.
    """
    layout = layout_of(config["quantization_config"])
    plain_config = {name: value for name, value in config.items() if name != "quantization_config"}
    file = folder / "config.json"
    file.write_text(json.dumps(plain_config), encoding="utf-8")
    try:
        model = build(folder, torch.bfloat16)
    finally:
        file.write_text(json.dumps(config), encoding="utf-8")
    found = layout.tensors(plain_tensors(model), linear_matrices(model))
    shards = _shards(named_forms(layout, found))
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, forms in zip(names, shards, strict=True):
        _write_header(folder / name, forms)
    places = {tensor: name for name, forms in zip(names, shards, strict=True) for tensor in forms}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")


def named_forms(layout: Layout, found: Mapping[str, Mapping[str, PartForm]]) -> dict[str, PartForm]:
    """What `Layout.tensors` found, by the checkpoint's names."""
    return {layout.name_of(plain, part): form for plain, forms in found.items() for part, form in forms.items()}


def _shards(forms: Mapping[str, PartForm]) -> list[dict[str, PartForm]]:
    """Split into shards like published checkpoints: a file is mapped as a whole, which must not exceed the memory."""
    shards: list[dict[str, PartForm]] = [{}]
    size = 0
    for name, form in forms.items():
        if shards[-1] and size + form.num_bytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = form
        size += form.num_bytes
    return shards


def _write_header(file: Path, forms: Mapping[str, PartForm]) -> None:
    header, end = {}, 0
    for name, form in forms.items():
        begin, end = end, end + form.num_bytes
        header[name] = {"dtype": _CODES[form.dtype], "shape": [*form.shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
