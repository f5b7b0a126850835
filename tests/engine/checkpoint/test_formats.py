"""Protects: experts and layers in the formats that checkpoints come in expand to their library's numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packers
import parity
import pytest
import torch
from packers import BLOCKS, FLOAT4, FLOAT8, FP8, INT4, NVFP4, Pack, float8_numbers, modelopt_numbers, words
from parity import JOBS, POLICIES
from quantized import edit_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine import Engine, Job, Policy
from engine.checkpoint.identity.result import identity_beside_weights
from engine.errors import EngineError
from engine.kernels.packed.matrix import PartForm
from engine.kernels.packed.numbers import ScaledBlocks
from engine.model.causal_model import CausalModel
from engine.weights.loading import check_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries about themselves

MX = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
BF16 = torch.bfloat16


def expanded(directory: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the packed parameters of a directory become, from their stored bytes."""
    model, state, found = (
        CausalModel(directory, dtype, torch.device("cpu")),
        load_file(directory / "model.safetensors"),
        {},
    )
    for name, packed in model.packed.items():
        memory = torch.full((packed.num_bytes,), 255, dtype=torch.uint8)
        for source in packed.parts:
            raw = state[source].reshape(-1).view(torch.uint8)
            memory[packed.first_byte(source) :][: len(raw)] = raw
        like = model.state[name]
        found[name] = torch.full(like.shape, torch.nan, dtype=like.dtype)
        packed.decode(memory, found[name].view(-1))
    return found


def check(directory: Path, expected: Path, dtype: torch.dtype) -> None:
    """Parameters are, bit for bit, those of what `from_pretrained` loads from `expected`."""
    reference = AutoModelForCausalLM.from_pretrained(expected, dtype=dtype).state_dict()
    found = expanded(directory, dtype)
    assert any(values.ndim == 3 for values in found.values())  # experts
    for name, values in found.items():
        assert values.equal(reference[name].to(dtype)), name


def compressed(layout: str, scale_type: torch.dtype = torch.float32, **weights: Any) -> tuple[Pack, dict[str, Any]]:
    return packers.compressed(layout, scale_type, **weights)[:2]


LOADED: dict[str, tuple[str, Callable[[], tuple[Pack, dict[str, Any]]]]] = {
    "float8 in blocks": ("deepseek-v3", lambda: (packers.float8_blocks(8, 16), BLOCKS)),
    "float8 in blocks, 16-bit scales": ("mixtral", lambda: (packers.float8_blocks(8, 16, BF16), BLOCKS)),
    "float8, a scale each": (
        "mixtral",
        lambda: (packers.float8_whole("weight_scale_inv"), {**FP8, "weight_block_size": None}),
    ),
    "int4": ("deepseek-v3", lambda: compressed("pack-quantized", BF16, **INT4)),
    "float8, scales of rows": ("mixtral", lambda: compressed("float-quantized", BF16, **FLOAT8, strategy="channel")),
    "float8, a scale of each": ("qwen3-moe", lambda: compressed("naive-quantized", **FLOAT8, strategy="tensor")),
    "MXFP4 of compressed-tensors": ("qwen3-moe", lambda: compressed("mxfp4-pack-quantized", **FLOAT4, **MX)),
}
"""Formats whose experts transformers loads and expands itself."""


@pytest.mark.parametrize("name", LOADED)
def test_experts_expand_to_what_transformers_loads(name: str, tmp_path: Path) -> None:
    family, make = LOADED[name]
    pack, told = make()
    # Linear layers of compressed-tensors, which transformers expands when they are first called, are in `test_packed`.
    which = packers.EXPERTS if told["quant_method"] == "compressed-tensors" else packers.MATRICES
    packers.save_packed(tmp_path, family, pack, told, which=which, num_hidden_layers=2)
    for dtype in (torch.float32, torch.bfloat16):
        check(tmp_path, tmp_path, dtype)


def test_experts_of_gpt_oss_as_published(tmp_path: Path) -> None:
    packers.save_mxfp4(tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check(tmp_path, tmp_path, dtype)


DECOMPRESSED = {
    "nvfp4": ("nvfp4-pack-quantized", NVFP4),
    "float8 in blocks": ("float-quantized", {**FLOAT8, "strategy": "block", "block_structure": [16, 16]}),
    "mxfp8": ("mxfp8-quantized", {**FLOAT8, **MX}),
    "int4 with zeros": ("pack-quantized", {**INT4, "symmetric": False}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DECOMPRESSED)
def test_experts_expand_to_what_compressed_tensors_makes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Which transformers 5.24 does not: it leaves out the global scale of NVFP4's experts, and fails at the others."""
    layout, weights = DECOMPRESSED[name]
    scale_type = dtype if layout in ("float-quantized", "pack-quantized") else torch.float32
    pack, told, unpack = packers.compressed(layout, scale_type, **weights)
    packers.save_packed(tmp_path / "packed", "mixtral", pack, told)
    packers.save_packed(tmp_path / "plain", "mixtral", lambda values: {"weight": unpack(pack(values)).float()}, None)
    check(tmp_path / "packed", tmp_path / "plain", dtype)


GROUPED = {"bits": 4, "group_size": 32}
BY_HAND: dict[str, tuple[Pack, Pack, dict[str, Any]]] = {
    "modelopt nvfp4": (packers.modelopt_fours, modelopt_numbers, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "modelopt float8": (
        packers.float8_whole("weight_scale"),
        lambda values: float8_numbers(packers.float8_whole("weight_scale")(values)),
        {"quant_method": "modelopt", "quant_algo": "FP8"},
    ),
    "fbgemm": (
        packers.float8_rows,
        lambda values: float8_numbers(packers.float8_rows(values)),
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
    ),
    "gptq": (*words("gptq"), {"quant_method": "gptq", **GROUPED}),
    "awq": (*words("awq"), {"quant_method": "awq", "version": "gemm", **GROUPED}),
    "auto-round": (*words("gptq"), {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", **GROUPED}),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_experts_expand_to_what_is_computed_by_hand(name: str, tmp_path: Path) -> None:
    """Formats whose libraries are not here; `test_packed` has matrices that they recorded."""
    pack, numbers, told = BY_HAND[name]
    packers.save_packed(tmp_path / "packed", "mixtral", pack, told)
    packers.save_packed(tmp_path / "plain", "mixtral", numbers, None)
    check(tmp_path / "packed", tmp_path / "plain", torch.float32)


def test_layers_that_the_model_does_not_have_are_left_out(good: Path, tmp_path: Path) -> None:
    """As DeepSeek-V3's last one, which predicts a second token."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    expected = expanded(tmp_path, torch.float32)
    edit(
        lambda state: state.update(
            {name.replace("layers.1.", "layers.9."): values.clone() for name, values in [*state.items()]}
        )
    )(tmp_path)
    found = expanded(tmp_path, torch.float32)
    assert expected.keys() == found.keys()
    check_checkpoint(tmp_path, CausalModel(tmp_path, torch.float32, torch.device("cpu")))


def test_blocks_are_smaller_at_the_edges() -> None:
    """As of DeepSeek-V3's 576 rows in blocks of 128, which transformers 5.24 refuses to cut."""
    codes, scales = torch.randn(11, 7).to(torch.float8_e4m3fn), torch.rand(3, 2)
    forms = {name: PartForm(each.dtype, each.shape) for name, each in (("weight", codes), ("weight_scale_inv", scales))}
    matrix = ScaledBlocks(codes.shape, forms, block=(4, 4))
    found = torch.empty(1, 11, 7)
    matrix.fill({"weight": codes[None], "weight_scale_inv": scales[None]}, found)
    for row in range(11):
        for column in range(7):
            assert found[0, row, column] == codes[row, column].float() * scales[row // 4, column // 4]


RUNS: dict[str, Callable[[Path], Path]] = {
    "mxfp4": packers.save_mxfp4,
    "float8 in blocks": lambda path: packers.save_packed(path, "deepseek-v3", *LOADED["float8 in blocks"][1]()),
    "int4": lambda path: packers.save_packed(path, "qwen3-moe", *compressed("pack-quantized", **INT4)),
}


@pytest.mark.parametrize("name", ["mxfp4", *(pytest.param(n, marks=pytest.mark.slow) for n in [*RUNS][1:])])
def test_runs_equal_transformers_and_depend_on_no_company(name: str, tmp_path: Path) -> None:
    """Wherever the packed bytes lie, and, in 16 bits, whatever runs beside."""
    directory = RUNS[name](tmp_path / "model")
    expected = parity.expect(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval())
    for policy in ("device", "small", "disk"):
        settings = {**POLICIES[policy], "device": "cpu", "offload-dir": str(tmp_path / "off")}
        with Engine.from_pretrained(str(directory), policy=settings) as engine:
            assert parity.differences(expected, engine.run(JOBS))[0] == []
    settings = {**POLICIES["host"], "device": "cpu", "dtype": "bfloat16", "batch-invariant": True}
    with Engine.from_pretrained(str(directory), policy=settings) as engine:
        together = engine.run(JOBS)
        for index in (0, 8):
            (alone,) = engine.run([JOBS[index]])
            assert (alone.tokens, alone.logprobs) == (together[index].tokens, together[index].logprobs)


def test_weights_in_memory_are_those_of_the_files(tmp_path: Path) -> None:
    """Layer by layer, beside stock layers, with the parts of experts read from the files again."""
    directory = RUNS["int4"](tmp_path / "model")
    with Engine.from_pretrained(str(directory), policy={**POLICIES["host"], "device": "cpu"}) as engine:
        jobs = [Job(prompt=[*range(20, 40)], max_new_tokens=4)]
        found = engine.compare_with_stock(jobs, engine.run(jobs))
    assert found.has_compared_weights
    assert [stage.name for stage in found.stages if not stage.is_within] == []


def test_what_is_not_rounded_is_in_the_identity(tmp_path: Path) -> None:
    """And so in every record of a run; a checkpoint whose format rounds nothing else has no such line."""
    policy = Policy(device="cpu")
    packers.save_packed(tmp_path / "float8", "mixtral", *LOADED["float8 in blocks"][1]())
    found = identity_beside_weights(str(tmp_path / "float8"), policy)
    assert found["left_unrounded"] == "inputs of linear layers and experts, in float8 (dynamic)"
    packers.save_mxfp4(tmp_path / "mxfp4")
    assert "left_unrounded" not in identity_beside_weights(str(tmp_path / "mxfp4"), policy)
    pack, told = compressed("float-quantized", **FLOAT8, strategy="channel")
    inputs = {**FLOAT8, "strategy": "token", "dynamic": True}
    told["config_groups"]["group_0"]["input_activations"] = inputs
    packers.save_packed(tmp_path / "experts", "mixtral", pack, told)
    found = identity_beside_weights(str(tmp_path / "experts"), policy)
    assert found["left_unrounded"] == "inputs of experts, in 8 bits"


def test_modelopts_own_file_is_read(tmp_path: Path) -> None:
    """Where config.json says nothing; the numbers are those of a config that does."""
    told = {"quant_method": "modelopt", "quant_algo": "FP8"}
    packers.save_packed(tmp_path, "mixtral", packers.float8_whole("weight_scale"), told)
    expected = expanded(tmp_path, torch.float32)
    edit_config(tmp_path, quantization_config=None)
    file = tmp_path / "hf_quant_config.json"
    content = {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": {"quant_algo": "FP8"}}
    file.write_text(json.dumps(content))
    found = expanded(tmp_path, torch.float32)
    assert expected.keys() == found.keys()
    assert all(found[name].equal(values) for name, values in expected.items())
    for changed, told_of in (
        ({**content, "producer": {"name": "other"}}, "the producer 'other'"),
        ({**content, "extra": 1}, "the field 'extra'"),
        ({**content, "quantization": {"quant_algo": "W4A8_AWQ"}}, "the quant_algo 'W4A8_AWQ'"),
        ({**content, "quantization": {"quant_algo": "FP8", "rotation": "r"}}, "the field 'rotation'"),
    ):
        file.write_text(json.dumps(changed))
        with pytest.raises(EngineError, match=told_of):
            CausalModel(tmp_path, torch.float32, torch.device("cpu"))


# What is refused. Each breaks a good directory; the message must be one line with these parts in it.


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of float8 in blocks."""
    directory = tmp_path_factory.mktemp("good")
    return packers.save_packed(directory, "qwen3-moe", packers.float8_blocks(8, 16), BLOCKS)


Q = "model.layers.1.mlp.experts.2.up_proj"


def edit(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def changed(directory: Path) -> None:
        state = load_file(directory / "model.safetensors")
        change(state)
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})

    return changed


def tell(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit_config(directory, quantization_config={**BLOCKS, **changes})


def rename(state: dict[str, torch.Tensor]) -> None:
    for name in [name for name in state if ".experts.3." in name]:
        state[name.replace(".experts.3.", ".experts.4.")] = state.pop(name)


SCALE = f"{Q}.weight_scale_inv"
REFUSED: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no scales": (edit(lambda state: state.pop(SCALE)), (Q, "weight_scale_inv is missing")),
    "no codes": (edit(lambda state: state.pop(f"{Q}.weight")), (Q, "weight is missing")),
    "scales of another shape": (
        edit(lambda state: state.update({SCALE: state[SCALE][:-1].clone()})),
        ("gate_up_proj", f"{Q} is packed in another way"),
    ),
    "all scales of another shape": (
        edit(
            lambda state: state.update({name: each[:1].clone() for name, each in state.items() if "scale_inv" in name})
        ),
        ("weight_scale_inv is [1,", "instead of"),
    ),
    "scales as codes": (
        edit(
            lambda state: state.update(
                {name: each.to(torch.float8_e4m3fn) for name, each in state.items() if "scale_inv" in name}
            )
        ),
        ("weight_scale_inv is float8_e4m3fn, not float32",),
    ),
    "an expert is missing": (
        edit(lambda state: [state.pop(name) for name in [*state] if name.startswith(f"{Q}.")]),
        ("gate_up_proj", "3 packed matrices", "4 experts"),
    ),
    "experts that are not there": (
        edit(rename),
        ("4 packed matrices", "the last of them model.layers.0.mlp.experts.4.down_proj", "numbered from 0"),
    ),
    "an expert left plain": (
        edit(lambda state: (state.pop(SCALE), state.update({f"{Q}.weight": state[f"{Q}.weight"].float()}))),
        ("3 packed matrices",),
    ),
    "something unknown": (
        edit(lambda state: state.update({f"{Q}.perm": torch.zeros(4)})),
        (Q, "a perm, which is not understood"),
    ),
    "blocks of no size": (tell(weight_block_size=[8, 0]), ("by fp8", "the weight_block_size [8, 0]")),
    "blocks of another size": (tell(weight_block_size=[16, 16]), ("weight_scale_inv is", "instead of")),
    "no blocks": (tell(weight_block_size=None), ("weight_scale_inv is", "no weight_block_size")),
    "another float8": (tell(fmt="e5m2"), ("by fp8", "the fmt 'e5m2'")),
    "four-bit experts": (tell(expert_dtype="fp4"), ("by fp8", "the expert_dtype 'fp4'")),
    "embeddings": (tell(modules_to_convert=["embed_tokens"]), ("by fp8", "the field 'modules_to_convert'")),
    "a field to come": (tell(rotation="hadamard"), ("by fp8", "the field 'rotation'")),
    "no config": (lambda path: edit_config(path, quantization_config=None), ("is stored as float8_e4m3fn",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_run_is_refused_by_name(name: str, good: Path, tmp_path: Path) -> None:
    change, parts = REFUSED[name]
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    change(tmp_path)
    with pytest.raises(EngineError) as caught:
        Engine.from_pretrained(str(tmp_path), policy={"device": "cpu"})
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert [part for part in parts if part not in str(caught.value)] == []


G = "model.layers.1.mlp.experts.gate_up_proj"
MXFP4_REFUSED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], tuple[str, ...]]] = {
    "no scales": (lambda state: state.pop(f"{G}_scales"), ("scales is missing",)),
    "too few experts": (
        lambda state: state.update({f"{G}_blocks": state[f"{G}_blocks"][:-1]}),
        ("there are 4 experts",),
    ),
    "other scales": (
        lambda state: state.update({f"{G}_scales": state[f"{G}_scales"].float()}),
        ("scales is float32, not uint8",),
    ),
    "no experts": (
        lambda state: [state.pop(name) for name in [*state] if name.endswith(("_blocks", "_scales"))],
        ("holds no such tensors",),
    ),
}


@pytest.mark.parametrize("name", MXFP4_REFUSED)
def test_mxfp4_that_cannot_be_run_is_refused(name: str, tmp_path: Path) -> None:
    change, parts = MXFP4_REFUSED[name]
    packers.save_mxfp4(tmp_path)
    edit(change)(tmp_path)
    with pytest.raises(EngineError) as caught:
        CausalModel(tmp_path, torch.float32, torch.device("cpu"))
    assert [part for part in parts if part not in str(caught.value)] == []
