"""Protects: a checkpoint that comes quantized computes what its own library makes of it, and moves as it is."""

from __future__ import annotations

import base64
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import parity
import pytest
import quantized
import torch
from parity import JOBS, POLICIES
from quantized import TOKEN, edit_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from engine import Engine, Job
from engine.checkpoint.names import CheckpointNames
from engine.checkpoint.quantized.methods import METHODS, checked_method
from engine.checkpoint.quantized.packed_parts import find_packed
from engine.errors import UnsupportedError
from engine.kernels.host import functions
from engine.kernels.packed.bitsandbytes import EightBitRows, FourBitBlocks
from engine.kernels.packed.parameter import PackedParameter
from engine.weights.stored_form import shape_of

RECORDS = json.loads((Path(__file__).parent / "packed_matrices.json").read_text())
"""Matrices that the formats' own libraries packed or read, with what they make of them."""

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries about themselves
Save = Callable[..., Path]


def tensor_of(record: dict[str, Any]) -> torch.Tensor:
    raw = torch.frombuffer(bytearray(base64.b64decode(record["data"])), dtype=torch.uint8)
    return raw.view(getattr(torch, record["dtype"])).view(record["shape"])


def stored(packed: PackedParameter, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The bytes that are kept and moved, of the checkpoint's tensors."""
    memory = torch.full((packed.num_bytes,), 255, dtype=torch.uint8)
    for source in packed.parts:
        raw = parts[source].reshape(-1).view(torch.uint8)
        memory[packed.first_byte(source) : packed.first_byte(source) + len(raw)] = raw
    return memory


class Alone(torch.nn.Module):
    """A model of one linear layer, as names of a checkpoint are looked up in."""

    base_model_prefix = ""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer = layer


@pytest.mark.parametrize("chunk", [64, 1 << 22])
@pytest.mark.parametrize("name", RECORDS)
def test_numbers_are_those_of_the_library(
    name: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, and unpacked in pieces, too."""
    monkeypatch.setattr("engine.kernels.packed.matrix.CHUNK_ELEMENTS", chunk)
    record = RECORDS[name]
    parts = {f"layer.{part}": tensor_of(each) for part, each in record["parts"].items()}
    layer = torch.nn.Linear(*record["shape"][::-1], bias=False)
    save_file(parts, tmp_path / "model.safetensors")
    names = CheckpointNames(Alone(layer), {"layer.weight": layer.weight})
    (matrix,) = find_packed(tmp_path, record["config"], {"layer.weight": layer}, names).values()
    expected = tensor_of(record["numbers"])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        values = torch.full((expected.numel(),), torch.nan, dtype=dtype)
        matrix.decode(stored(matrix, parts), values)
        assert values.view(expected.shape).equal(expected.to(dtype))


def run(directory: Path, tmp_path: Path, policy: str, **settings: Any) -> tuple[Any, PackedParameter]:
    """Completions of the jobs, and one of the packed matrices."""
    settings = {**POLICIES[policy], "device": "cpu", "offload-dir": str(tmp_path / "off"), **settings}
    with Engine.from_pretrained(str(directory), policy=settings) as engine:
        assert engine.parts.model.packed
        return engine.run(JOBS), next(iter(engine.parts.model.packed.values()))


INT4 = {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True}
INT8 = {"num_bits": 8, "strategy": "channel", "symmetric": True}
FLOAT8 = {**INT8, "type": "float"}
STATIC = {**TOKEN, "dynamic": False, "strategy": "tensor"}
COMPRESSED = {
    "4 bits": ("llama", INT4, "pack-quantized", {}),
    "4 bits, biases": ("opt", INT4, "pack-quantized", {"dtype": torch.bfloat16}),
    "4 bits, the head too": ("llama", INT4, "pack-quantized", {"ignore": ()}),
    "8 bits": ("qwen2", INT8, "pack-quantized", {}),
    "8 bits of one scale": ("llama", {**INT8, "strategy": "tensor"}, "pack-quantized", {}),
    "8 bits, inputs too": ("llama", INT8, "int-quantized", {"inputs": TOKEN}),
    "float8": ("gemma2", FLOAT8, "naive-quantized", {}),
    "float8, inputs too": ("llama", FLOAT8, "float-quantized", {"inputs": {**TOKEN, "type": "float"}}),
    "float8 in blocks, inputs in groups": (
        "llama",
        {**FLOAT8, "strategy": "block", "block_structure": [16, 32]},
        "float-quantized",
        {"inputs": {**TOKEN, "type": "float", "strategy": "group", "group_size": 32}},
    ),
    "float8, inputs of one scale": ("llama", FLOAT8, "float-quantized", {"inputs": {**STATIC, "type": "float"}}),
}


LONG = {"4 bits", "8 bits", "float8, inputs too"}
"""What these combine is in the others, too."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in COMPRESSED]
)
def test_compressed_tensors_equals_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own forward of the same checkpoint, weights decompressed and inputs rounded by the library.

    Where inputs are rounded, a sum in another order may take one over the middle between two numbers of its grid, which
    moves a log-probability by about 1e-3: only a prompt by itself, whose sums have the same order, is the same then,
    and only by torch's functions.
    """
    family, weights, layout, more = COMPRESSED[name]
    directory = quantized.save_compressed(tmp_path / "model", family, weights, layout, **more)
    done, _ = run(directory, tmp_path, "thirds")
    if "inputs" not in more:
        assert parity.differences(parity.expect(models.load_reference(directory)), done)[0] == []
        return
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    assert parity.differences(parity.expect(reference), done)[1] < 0.05
    prompt = [*range(20, 60)]
    monkeypatch.setattr(functions, "loaded", lambda: None)
    with Engine.from_pretrained(str(directory), policy={**POLICIES["host"], "device": "cpu"}) as engine:
        (alone,) = engine.run([Job(prompt=prompt, max_new_tokens=0, prompt_logprobs=True)])
    assert alone.prompt_logprobs is not None
    assert alone.prompt_logprobs[1:] == pytest.approx(models.reference_logprobs(reference, prompt), abs=1e-5)


@pytest.mark.parametrize("weights", [{**INT4, "symmetric": False}, {**INT8, "symmetric": False}])
def test_compressed_tensors_with_zeros(weights: dict[str, Any], tmp_path: Path) -> None:
    """Which transformers 5.24 cannot load; the numbers are those of the library."""
    directory = quantized.save_compressed(tmp_path / "model", "llama", weights, "pack-quantized")
    done, matrix = run(directory, tmp_path, "20-80")
    assert "weight_zero_point" in matrix.matrix.parts
    assert parity.differences(parity.expect(quantized.dense(directory)), done)[0] == []


def test_rounded_inputs_are_seen(tmp_path: Path) -> None:
    """Without them, results would be others."""
    directory = quantized.save_compressed(tmp_path / "model", "llama", INT8, "int-quantized", inputs=TOKEN)
    expected = parity.expect(models.load_reference(directory))
    told = json.loads((directory / "config.json").read_text())["quantization_config"]
    told["config_groups"]["group_0"]["input_activations"] = None
    edit_config(directory, quantization_config=told)
    assert len(parity.differences(expected, run(directory, tmp_path, "device")[0])[0]) > 3


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(policy, marks=[] if policy in ("disk", "thirds", "small") else [pytest.mark.slow])
        for policy in POLICIES
    ],
)
def test_placement_makes_no_difference(policy: str, tmp_path: Path) -> None:
    directory = quantized.save_grouped(tmp_path / "model", "gptq")
    expected = parity.expect(quantized.from_state(directory, load_file(directory / "expected.st")))
    settings = {**POLICIES[policy], "device": "cpu", "offload-dir": str(tmp_path / "off")}
    with Engine.from_pretrained(str(directory), policy=settings) as engine:
        for _ in range(2):
            assert parity.differences(expected, engine.run(JOBS))[0] == []


@pytest.mark.parametrize(
    ("method", "more"),
    [("gptq", {"bits": 8}), ("gptq", {"by_activity": True}), ("gptq", {"group": 64, "bits": 2}), ("awq", {})],
)
def test_grouped_layouts(method: str, more: dict[str, Any], tmp_path: Path) -> None:
    directory = quantized.save_grouped(tmp_path / "model", method, **more)
    done, _ = run(directory, tmp_path, "thirds")
    reference = quantized.from_state(directory, load_file(directory / "expected.st"))
    assert parity.differences(parity.expect(reference), done)[0] == []


def test_packed_bytes_are_what_is_kept_and_planned(tmp_path: Path) -> None:
    """The checkpoint's own tensors, one after the other: a layer takes about a seventh of its float32."""
    directory = quantized.save_grouped(tmp_path / "model", "gptq")
    state = load_file(directory / "model.safetensors")
    with Engine.from_pretrained(str(directory), policy={**POLICIES["host"], "device": "cpu"}) as engine:
        engine.wait_until_loaded()
        store, shape = engine.parts.weights, shape_of(engine.parts.model)
        for name, matrix in engine.parts.model.packed.items():
            placed, extent = store._extent_of[name]
            memory = store.stored_bytes(placed.unit.name, extent.first, extent.end)
            for source in matrix.parts:
                raw = state[source].reshape(-1).view(torch.uint8)
                assert memory[matrix.first_byte(source) :][: len(raw)].equal(raw)
        layer = sum(store.placed_bytes()["layer.0"].values())
        assert layer == shape.unit_bytes[0]
        assert shape.stored_part < 0.2
        assert shape.expanded_bytes >= engine.parts.stream._expansion.num_bytes > layer


HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed: it is large, and not in [test]")
@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "float16"},
        {"load_in_8bit": True},
    ],
)
def test_bitsandbytes_checkpoints(settings: dict[str, Any], build: Callable[[str], Path], tmp_path: Path) -> None:
    """Saved by transformers; the numbers are those of the library."""
    import bitsandbytes

    told = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(build("llama"), dtype=torch.float32, quantization_config=told)
    model.save_pretrained(tmp_path / "model")
    models.make_tokenizer().save_pretrained(tmp_path / "model")
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    reference = models.load_reference(build("llama"))
    for name, layer in quantized.layers_of(loaded).items():
        if "load_in_4bit" in settings:
            numbers = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        else:
            numbers = bitsandbytes.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
        reference.get_submodule(name).weight.data.copy_(numbers)
    done, matrix = run(tmp_path / "model", tmp_path, "thirds")
    assert type(matrix.matrix) is (FourBitBlocks if "load_in_4bit" in settings else EightBitRows)
    assert parity.differences(parity.expect(reference), done)[0] == []


# What is refused. Each breaks a good directory; the message must be one line with these parts in it.


def tell(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        told = json.loads((directory / "config.json").read_text())["quantization_config"]
        edit_config(directory, quantization_config={**told, **changes})

    return change


def edit_state(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        state = load_file(directory / "model.safetensors")
        change(state)
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})

    return edit


Q = "model.layers.1.self_attn.q_proj"


def lose(part: str) -> Callable[[Path], None]:
    return edit_state(lambda state: state.pop(f"{Q}.{part}"))


def cut(part: str) -> Callable[[Path], None]:
    return edit_state(lambda state: state.update({f"{Q}.{part}": state[f"{Q}.{part}"][:-1].clone()}))


def move(where: str) -> Callable[[Path], None]:
    parts = ("qweight", "qzeros", "scales", "g_idx")
    return edit_state(lambda state: state.update({f"{where}.{part}": state.pop(f"{Q}.{part}") for part in parts}))


def instead(**told: Any) -> Callable[[Path], None]:
    """Say that it is of compressed-tensors, and this of it."""
    return lambda directory: edit_config(
        directory, quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized", **told}
    )


REFUSED: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "hqq": (tell(quant_method="hqq"), ("by hqq", "unquantized", "auto-round or gguf")),
    "fields of another method": (tell(quant_method="mxfp4"), ("by mxfp4 with the field 'bits'",)),
    "no method": (tell(quant_method=None), ("an unnamed method",)),
    "marlin": (tell(checkpoint_format="marlin"), ("gptq", "the layout 'marlin'")),
    "AWQ by columns": (tell(quant_method="awq", version="gemv"), ("awq", "the layout gemv")),
    "sparse": (instead(sparsity_config={"format": "2:4"}), ("sparse weights",)),
    "cache": (instead(kv_cache_scheme={"num_bits": 8}), ("kv_cache_scheme",)),
    "inputs in groups": (
        instead(
            config_groups={"a": {"weights": INT4, "input_activations": {**TOKEN, "strategy": "group"}}},
        ),
        ("inputs in 8 bits by group (dynamic)",),
    ),
    "inputs of some layers": (
        instead(
            config_groups={"a": {"input_activations": TOKEN}, "b": {"input_activations": None}},
        ),
        ("inputs in 8 bits by token (dynamic)",),
    ),
    "another method's tensors": (instead(), ("holds no such tensors",)),
    "no zeros": (lose("qzeros"), (Q, "qzeros is missing")),
    "a part of another shape": (cut("scales"), (Q, "instead of")),
    "something unknown": (
        edit_state(lambda state: state.update({f"{Q}.perm": torch.zeros(4)})),
        (Q, "a perm, which is not understood"),
    ),
    "the embedding": (move("model.embed_tokens"), ("model.embed_tokens", "only linear layers")),
    "a norm": (move("model.layers.1.input_layernorm"), ("input_layernorm (LlamaRMSNorm)", "only linear layers")),
    "a cache of another kind": (
        instead(transform_config={"a": 1}),
        ("transform_config",),
    ),
    "a field to come": (instead(block_rotation=4), ("the field 'block_rotation'",)),
    "weights' field to come": (
        instead(config_groups={"a": {"weights": {**INT4, "codebook": "e8"}}}),
        ("the field 'codebook'",),
    ),
    "a group's format": (
        instead(config_groups={"a": {"weights": INT4, "format": "marlin-24"}}),
        ("the format 'marlin-24'",),
    ),
    "groups as a list": (instead(config_groups=[INT4]), ("config_groups [",)),
    "words of 8 bits": (tell(pack_dtype="int8"), ("gptq", "words of 'int8'")),
    "rotated": (tell(rotation="hadamard"), ("gptq", "rotation")),
    "scales as codes": (
        edit_state(lambda state: state.update({f"{Q}.scales": state[f"{Q}.scales"].to(torch.uint8)})),
        (Q, "scales is uint8, no plain numbers"),
    ),
    "words of 64 bits": (
        edit_state(lambda state: state.update({f"{Q}.qweight": state[f"{Q}.qweight"].long()})),
        (Q, "qweight is int64, not int32"),
    ),
    "3 bits": (
        edit_state(lambda state: state.update({f"{Q}.qweight": torch.zeros(6, 64, dtype=torch.int32)})),
        (Q, "3 bits a number"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_run_is_refused_by_name(name: str, tmp_path: Path) -> None:
    change, parts = REFUSED[name]
    directory = quantized.save_grouped(tmp_path / "model", "gptq")
    change(directory)
    with pytest.raises(UnsupportedError) as caught:
        Engine.from_pretrained(str(directory), policy={"device": "cpu"})
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)
    assert [part for part in parts if part not in str(caught.value)] == []


RUN = {
    *("int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "mixed-precision"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
}


def test_every_format_of_the_library_is_run_or_refused_by_name(tmp_path: Path) -> None:
    from compressed_tensors import CompressionFormat

    directory = quantized.save_compressed(tmp_path / "model", "llama", INT8, "int-quantized")
    names = {each.value for each in CompressionFormat}
    assert names > RUN
    for name in names - RUN:
        tell(format=name)(directory)
        with pytest.raises(UnsupportedError, match=f"compressed-tensors with the format '{name}'"):
            Engine.from_pretrained(str(directory), policy={"device": "cpu"})


def test_every_method_of_transformers_is_run_or_refused_by_name(tmp_path: Path) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    run = {
        "bitsandbytes_4bit",
        "bitsandbytes_8bit",
        "compressed-tensors",
        "fp8",
        "fbgemm_fp8",
        "mxfp4",
        "gptq",
        "awq",
        "gguf",
    }
    names = AUTO_QUANTIZATION_CONFIG_MAPPING.keys() | {"exl3", "modelopt"}
    for name in names - run - {"auto-round", "modelopt"}:
        with pytest.raises(
            UnsupportedError, match=f"is quantized by {name}, which cannot be run; take the unquantized"
        ):
            checked_method(tmp_path, {"quant_method": name})
    for name in run & METHODS.keys():
        assert checked_method(tmp_path, {"quant_method": name}) == name
    for name in ("auto-round", "modelopt"):
        with pytest.raises(UnsupportedError, match=f"by {name} with the (packing_format|quant_algo) None"):
            checked_method(tmp_path, {"quant_method": name})


def test_exponents_are_no_scales(tmp_path: Path) -> None:
    """MXFP8's scales are exponents in one byte each: taken for numbers, they are off by a factor of 237,568."""
    directory = quantized.save_compressed(tmp_path / "model", "llama", FLOAT8, "naive-quantized")
    scales = {f"{Q}.weight_scale": torch.full((64, 2), 116, dtype=torch.uint8)}
    edit_state(lambda state: state.update(scales))(directory)
    with pytest.raises(UnsupportedError, match="its tensors are mxfp8-quantized, and the format is 'naive-quantized'"):
        Engine.from_pretrained(str(directory), policy={"device": "cpu"})


def test_blocks_of_float8_are_refused(tmp_path: Path) -> None:
    directory = quantized.save_compressed(tmp_path / "model", "llama", FLOAT8, "naive-quantized")
    edit_state(lambda state: state.update({f"{Q}.weight_scale": torch.ones(2, 2).half()}))(directory)
    with pytest.raises(UnsupportedError, match="neither of rows nor of groups"):
        Engine.from_pretrained(str(directory), policy={"device": "cpu"})


def test_transposed_layers_are_refused(tmp_path: Path) -> None:
    """GPT-2's matrices are no linear layers: which way their codes lie is not told."""
    models.save_model(tmp_path, "gpt2")
    edit_config(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    name = "transformer.h.0.attn.c_attn"
    extra = {f"{name}.SCB": torch.ones(192), **load_file(tmp_path / "model.safetensors")}
    save_file(extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"c_attn \(Conv1D\) is quantized by bitsandbytes; only linear layers"):
        Engine.from_pretrained(str(tmp_path), policy={"device": "cpu"})


@pytest.mark.parametrize("codes", [4, "lossless"])
def test_codes_of_codes_are_refused(codes: int | str, tmp_path: Path) -> None:
    directory = quantized.save_grouped(tmp_path / "model", "awq")
    with pytest.raises(UnsupportedError, match=r"compress-weight: .* is already quantized; leave compress-weight out"):
        Engine.from_pretrained(str(directory), policy={"device": "cpu", "compress-weight": codes})


def test_a_cache_may_be_encoded_besides(tmp_path: Path) -> None:
    directory = quantized.save_grouped(tmp_path / "model", "awq")
    done, _ = run(directory, tmp_path, "thirds", **{"compress-cache": 8})
    expected = parity.expect(quantized.from_state(directory, load_file(directory / "expected.st")))
    assert 0 < parity.differences(expected, done)[1] < 0.05
