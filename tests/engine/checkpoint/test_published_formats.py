"""Protects: every kind of quantized checkpoint that the documents count runs as they say, or is refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import models
import packers
import parity
import pytest
import quantized
import torch
from packers import BLOCKS, EXPERTS, FLOAT8, INT4, NVFP4, Pack, float8_numbers, modelopt_numbers, words
from parity import JOBS, POLICIES
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine import Engine
from engine.errors import EngineError

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries about themselves


@dataclass(frozen=True)
class Case:
    """A kind of checkpoint that runs."""

    save: Callable[[Path], object]
    plain: Callable[[Path], object] | None = None
    """Writes the same model with the numbers that the format stands for; else plain transformers loads `save`'s."""


def packed(family: str, pack: Pack, told: dict[str, Any], **more: Any) -> Callable[[Path], Path]:
    return partial(packers.save_packed, family=family, pack=pack, told=told, **more)


def by_hand(family: str, pack: Pack, numbers: Pack, told: dict[str, Any], which: str = packers.MATRICES) -> Case:
    return Case(
        packed(family, pack, told, which=which),
        partial(packers.save_packed, family=family, pack=numbers, told=None, which=which),
    )


def decompressed(family: str, layout: str, which: str = packers.MATRICES, **weights: Any) -> Case:
    pack, told, unpack = packers.compressed(layout, **weights)
    return by_hand(family, pack, lambda values: {"weight": unpack(pack(values)).float()}, told, which)


def modelopt(pack: Pack, numbers: Pack, algorithm: str) -> Case:
    """Declared in ModelOpt's own file alone."""

    def save(directory: Path) -> None:
        packers.save_packed(directory, "llama", pack, None)
        content = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm}}
        (directory / "hf_quant_config.json").write_text(json.dumps(content))

    return Case(save, partial(packers.save_packed, family="llama", pack=numbers, told=None))


def grouped(method: str, family: str, told: dict[str, Any]) -> Case:
    return by_hand(family, *words(method), {**told, "bits": 4, "group_size": 32})


def auto_round_words(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """GPTQ's but for zeros, which are not stored less one."""
    parts = quantized.grouped(values, "gptq")[0]
    return {**parts, "qzeros": parts["qzeros"] + 0x11111111}


ATTENTION = r"self_attn\.\w+_proj\.weight$"
FLOAT8_ONE = packers.float8_whole("weight_scale")
ROWS = {**FLOAT8, "strategy": "channel"}
AUTO = {"quant_method": "auto-round", "bits": 4, "group_size": 32}
RUN: dict[str, Case] = {
    "fp8 in blocks, qwen3": Case(packed("qwen3", packers.float8_blocks(8, 16), BLOCKS)),
    "fp8 in blocks, deepseek_v3": Case(packed("deepseek-v3", packers.float8_blocks(8, 16), BLOCKS)),
    "mxfp4, gpt_oss": Case(packers.save_mxfp4),
    "compressed-tensors int4": Case(
        partial(quantized.save_compressed, family="llama", weights=INT4, layout="pack-quantized"),
    ),
    "compressed-tensors int4, experts of deepseek_v3": decompressed("deepseek-v3", "pack-quantized", EXPERTS, **INT4),
    "compressed-tensors int4, experts of qwen3_moe": decompressed("qwen3-moe", "pack-quantized", EXPERTS, **INT4),
    "compressed-tensors int4, experts left alone": decompressed("qwen3-moe", "pack-quantized", ATTENTION, **INT4),
    "compressed-tensors fp8 by rows": Case(
        partial(quantized.save_compressed, family="llama", weights=ROWS, layout="float-quantized")
    ),
    "compressed-tensors fp8 by rows, experts of mixtral": decompressed("mixtral", "float-quantized", EXPERTS, **ROWS),
    "compressed-tensors fp8 in blocks": decompressed(
        "qwen3", "float-quantized", **FLOAT8, strategy="block", block_structure=[16, 16]
    ),
    "compressed-tensors nvfp4": decompressed("llama", "nvfp4-pack-quantized", **NVFP4),
    "modelopt nvfp4, in config.json": by_hand(
        "llama", packers.modelopt_fours, modelopt_numbers, {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    ),
    "modelopt nvfp4, in its own file": modelopt(packers.modelopt_fours, modelopt_numbers, "NVFP4"),
    "modelopt fp8, in its own file": modelopt(FLOAT8_ONE, lambda values: float8_numbers(FLOAT8_ONE(values)), "FP8"),
    "awq, experts of mixtral": grouped("awq", "mixtral", {"quant_method": "awq", "version": "gemm"}),
    "gptq, experts of qwen3_moe": grouped("gptq", "qwen3-moe", {"quant_method": "gptq"}),
    "gptq": grouped("gptq", "llama", {"quant_method": "gptq"}),
    "awq": grouped("awq", "llama", {"quant_method": "awq", "version": "gemm"}),
    "fbgemm_fp8": by_hand(
        "llama",
        packers.float8_rows,
        lambda values: float8_numbers(packers.float8_rows(values)),
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
    ),
    "auto-round": by_hand("llama", auto_round_words, words("gptq")[1], {**AUTO, "packing_format": "auto_round"}),
    "auto-round in gptq's packing": by_hand(
        "llama", *words("gptq"), {**AUTO, "packing_format": "auto_round:auto_gptq"}
    ),
    "an empty quantization_config": Case(
        lambda path: quantized.edit_config(models.save_model(path, "llama"), quantization_config={}),
        partial(models.save_model, family="llama"),
    ),
}


def told(**quantization: Any) -> Callable[[Path], None]:
    return lambda path: quantized.edit_config(models.save_model(path, "llama"), quantization_config=quantization)


def silent(path: Path) -> None:
    packers.save_packed(path, "qwen3", packers.float8_blocks(8, 16), None)


OTHER = (
    "torchao",
    "hqq",
    "eetq",
    "bitnet",
    "quanto",
    "aqlm",
    "vptq",
    "spqr",
    "higgs",
    "quark",
    "fp_quant",
    "sinq",
    "exl3",
)
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    **{method: (told(quant_method=method), f"is quantized by {method}, which") for method in OTHER},
    "unnamed": (told(bits=4), "is quantized by an unnamed method, which"),
    "gptq in marlin's layout": (
        told(quant_method="gptq", bits=4, group_size=32, is_marlin_format=True),
        "by gptq with the layout 'marlin'",
    ),
    "awq gemv": (told(quant_method="awq", bits=4, group_size=32, version="gemv"), "by awq with the layout gemv"),
    "fp8 in blocks, not told of": (silent, "is stored as float8_e4m3fn"),
}


def test_the_documents_count_these() -> None:
    text = (Path(__file__).parents[3] / "docs" / "families.md").read_text()
    counts = (
        f"{len(RUN) + len(REFUSED)} kinds of checkpoint were tried",
        f"{len(RUN)} run",
        f"{len(REFUSED)} are refused",
    )
    assert [each for each in counts if each not in " ".join(text.split())] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_it_runs_as_its_numbers_do(name: str, tmp_path: Path) -> None:
    case = RUN[name]
    case.save(directory := tmp_path / "model")
    (case.plain or case.save)(tmp_path / "plain")
    reference: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    expected = parity.expect(reference)
    settings = {**POLICIES["thirds"], "device": "cpu", "offload-dir": str(tmp_path / "off")}
    with Engine.from_pretrained(str(directory), policy={**settings, "dtype": "float32"}) as engine:
        assert bool(engine.parts.model.packed) is (name != "an empty quantization_config")
        assert parity.differences(expected, engine.run(JOBS))[0] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(name: str, tmp_path: Path) -> None:
    save, words_of = REFUSED[name]
    save(tmp_path / "model")
    with pytest.raises(EngineError) as caught:
        Engine.from_pretrained(str(tmp_path / "model"), policy={"device": "cpu"})
    assert words_of in str(caught.value)
    assert "\n" not in str(caught.value)
