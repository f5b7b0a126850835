"""Protects: shapes of models that are published packed have the published tensors, and codes that are numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import packers
import pytest
import torch
from safetensors import safe_open

from engine import Job, Policy
from engine.errors import EngineError
from flexgen_helm.planning.dummy import open_dummy, shape_config, write_model_directory
from flexgen_helm.planning.shapes import SHAPES

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 500,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
SMALLER = {
    "deepseek-v3": {**SMALL, "n_routed_experts": 16},
    "kimi-k2": {**SMALL, "n_routed_experts": 16},
    "gpt-oss-20b": {
        **{key: SMALL[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")},
        "intermediate_size": 64,
        "head_dim": 16,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    },
}


def shape_file(folder: Path, name: str, **changes: Any) -> str:
    """A file that names a shape, and what of it is smaller."""
    file = folder / "shape.json"
    file.write_text(json.dumps({"shape": name, **SMALLER[name], **changes}))
    return str(file)


def headers(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of every tensor in a directory's weight files, by the library."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                part = handle.get_slice(name)
                found[name] = part.get_dtype(), part.get_shape()
    return found


def save_checkpoint(folder: Path, name: str) -> Path:
    """The same model in the same format, by the writers of the tests of formats."""
    config = dict(shape_config(shape_file(folder, name)))
    told = config.pop("quantization_config")
    changes = {key: value for key, value in config.items() if key not in ("model_type", "dtype")}
    if name == "gpt-oss-20b":
        return packers.save_mxfp4(folder / "model", **changes)
    if name == "deepseek-v3":
        pack = packers.float8_blocks(*told["weight_block_size"])
        which = r"(mlp|experts\.\d+|shared_experts|self_attn)\.(\w+_proj|\w+_mqa)\.weight$"
    else:
        pack = packers.compressed("pack-quantized", torch.bfloat16, **told["config_groups"]["group_0"]["weights"])[0]
        which = packers.EXPERTS
    return packers.save_packed(folder / "model", "deepseek-v3", pack, told, which=which, **changes)


@pytest.mark.parametrize("name", SMALLER)
def test_a_shape_has_the_tensors_of_a_checkpoint_of_its_format(name: str, tmp_path: Path) -> None:
    """Names, types and shapes of all that is packed; nothing plain is among them, and nothing packed is missing."""
    expected = headers(save_checkpoint(tmp_path, name))
    write_model_directory(str(tmp_path / "shape.json"), tmp_path / "written")
    found = headers(tmp_path / "written")
    packed = {part: form for part, form in expected.items() if part.endswith(("scale", "_inv", "_scales"))}
    assert len(packed) > 8 or name == "gpt-oss-20b"
    assert found == {part: form for part, form in expected.items() if part in found}
    assert packed.keys() <= found.keys()
    codes = {"F8_E4M3", "I32", "U8"}
    assert {part for part, (kind, _) in expected.items() if kind in codes} <= found.keys()


@pytest.mark.parametrize("name", SMALLER)
def test_random_codes_are_numbers_of_the_size_of_weights(name: str, tmp_path: Path) -> None:
    policy = Policy.from_mapping({"device": "cpu", "percent": [0, 100, 0, 100, 0, 100]})
    with open_dummy(shape_file(tmp_path, name), policy) as engine:
        store, model = engine.parts.weights, engine.parts.model
        assert model.packed
        for unit in model.units:
            extents = {each.name: each for each in (store.placed[unit.name].extents if unit.owners else ())}
            for parameter in extents.keys() & model.packed.keys():
                whole, like = model.packed[parameter], model.state[parameter]
                extent, numbers = extents[parameter], torch.empty(like.numel(), dtype=like.dtype)
                stored = store.stored_bytes(unit.name, extent.first, extent.first + whole.num_bytes)
                whole.decode(stored, numbers)
                size = float(numbers.float().square().mean().sqrt()) * whole.matrix.columns**0.5
                assert 0.5 < size < 2.0, (parameter, size)  # NaN is not
        (done,) = engine.run([Job(prompt=[5, 6, 7, 8], max_new_tokens=3)])
        assert done.error is None


def test_shape_files_and_formats_that_are_none_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "shape.json"
    file.write_text(json.dumps({"shape": "deepseek-v2"}))
    with pytest.raises(EngineError, match=r"shape 'deepseek-v2' is none; did you mean 'deepseek-v3'"):
        shape_config(str(file))
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
    for told, words in (
        (awq, "random codes are not made of 'awq'"),
        ({"quant_method": "hqq"}, "quantized by hqq, which cannot be run"),
        ({**SHAPES["deepseek-v3"]["quantization_config"], "fmt": "e5m2"}, "the fmt 'e5m2'"),
    ):
        named = shape_file(tmp_path, "deepseek-v3", quantization_config=told)
        with pytest.raises(EngineError, match=words) as caught:
            write_model_directory(named, tmp_path / "written")
        assert named in str(caught.value)
