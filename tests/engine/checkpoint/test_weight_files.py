"""Protects: of a model directory, those tensors are read that `from_pretrained` reads, and no others."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine import Engine, Job
from engine.checkpoint.description import describe
from engine.errors import CheckpointError, UnsupportedError
from engine.model.causal_model import CausalModel
from engine.weights.loading import check_checkpoint

Build = Callable[[str], Path]
State = dict[str, torch.Tensor]
PROMPT = [*range(20, 40), 7]


def found(directory: Path, **policy: Any) -> list[float]:
    """Log-probabilities of the prompt, the engine's."""
    with Engine.from_pretrained(str(directory), policy={"device": "cpu", **policy}) as engine:
        [done] = engine.run([Job(prompt=PROMPT, max_new_tokens=0, prompt_logprobs=True)])
    assert done.prompt_logprobs is not None
    return [value for value in done.prompt_logprobs if value is not None]


def by_default(directory: Path) -> PreTrainedModel:
    """What `from_pretrained` makes of a directory by itself."""
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def assert_as_transformers(directory: Path) -> None:
    expected = models.reference_logprobs(by_default(directory), PROMPT)
    assert found(directory) == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def directory(build: Build, tmp_path: Path) -> Path:
    return Path(shutil.copytree(build("llama"), tmp_path / "model"))


def state_of(directory: Path) -> State:
    return load_file(directory / "model.safetensors")


def others(directory: Path) -> State:
    """Other numbers under the same names."""
    return {name: (tensor * 0.5 + 0.01).contiguous() for name, tensor in state_of(directory).items()}


def save(state: State, file: Path) -> None:
    save_file(state, file, metadata={"format": "pt"})


def write_index(directory: Path, kind: str, listed: dict[str, str]) -> None:
    name = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def beside(name: str) -> Callable[[Path], None]:
    def add(directory: Path) -> None:
        save(others(directory), directory / name)

    return add


def stale_index(directory: Path) -> None:
    write_index(directory, "safetensors", dict.fromkeys(state_of(directory), "model-00001-of-00002.safetensors"))


def index_beside_others(directory: Path) -> None:
    """The single file of an older save lies beside shards: it is the checkpoint."""
    save(others(directory), directory / "model-00001-of-00001.safetensors")
    write_index(directory, "safetensors", dict.fromkeys(state_of(directory), "model-00001-of-00001.safetensors"))


def shards_beside_consolidated(directory: Path) -> None:
    save(others(directory), directory / "consolidated.safetensors")
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    names = load_file(directory / "model-00001-of-00001.safetensors")
    write_index(directory, "safetensors", dict.fromkeys(names, "model-00001-of-00001.safetensors"))


def bins_of_two_precisions(directory: Path) -> None:
    torch.save(state_of(directory), directory / "pytorch_model.bin")
    torch.save(others(directory), directory / "pytorch_model.fp16.bin")
    (directory / "model.safetensors").unlink()


def bin_beside_its_index(directory: Path) -> None:
    bins_of_two_precisions(directory)
    write_index(directory, "bin", {"a": "pytorch_model-00001-of-00001.bin"})


def bin_beside_consolidated(directory: Path) -> None:
    """`transformers` does not take a safetensors file of another name before a `.bin` of its own."""
    save(others(directory), directory / "consolidated.safetensors")
    bins_of_two_precisions(directory)


def named_by_the_config(directory: Path) -> None:
    save(others(directory), directory / "special.safetensors")
    edit_config(directory, transformers_weights="special.safetensors")


def of_an_old_torch(directory: Path) -> None:
    """No zip archive, as `.bin` was before torch 1.6."""
    torch.save(state_of(directory), directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (directory / "model.safetensors").unlink()


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "consolidated": beside("consolidated.safetensors"),
    "a backup": beside("model_old.safetensors"),
    "a variant": beside("model.fp16.safetensors"),
    "last by name": beside("zzz.safetensors"),
    "a stale index": stale_index,
    "one file beside shards": index_beside_others,
    "shards beside consolidated": shards_beside_consolidated,
    "bins of two precisions": bins_of_two_precisions,
    "a bin beside an index": bin_beside_its_index,
    "a bin beside consolidated": bin_beside_consolidated,
    "named by the config": named_by_the_config,
    "an old bin": of_an_old_torch,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_those_files_are_read_that_transformers_reads(layout: str, directory: Path) -> None:
    LAYOUTS[layout](directory)
    assert_as_transformers(directory)


def test_other_names_are_told_where_there_are_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"no weights: none of model.safetensors, .*'consolidated.safetensors'"):
        describe(str(directory))


def test_a_tensor_in_two_shards_is_refused(directory: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save(others(directory), directory / name)
    listed = dict.fromkeys(state_of(directory), "a.safetensors") | {"lm_head.weight": "b.safetensors"}
    (directory / "model.safetensors").unlink()
    write_index(directory, "safetensors", listed)
    with pytest.raises(CheckpointError, match=r"is in a.safetensors and in b.safetensors"):
        found(directory)


HEADS = {
    "llama": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
    "opt": "model.decoder.embed_tokens.weight",
}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("family", HEADS)
def test_two_different_tables_are_not_tied(family: str, form: str, tmp_path: Path) -> None:
    """Where the config says that they are; of the same numbers, they are one."""
    path = models.save_model(tmp_path, family, tie_word_embeddings=True)
    state = state_of(path)
    table = state[HEADS[family]]
    for head in (table.flip(0).contiguous(), table.clone()):
        state["lm_head.weight"] = head
        if form == "bin":
            torch.save(state, path / "pytorch_model.bin")
            (path / "model.safetensors").unlink(missing_ok=True)
        else:
            save(state, path / "model.safetensors")
        assert_as_transformers(path)


def test_two_tables_that_are_the_same_in_the_model_s_dtype_are_tied(tmp_path: Path) -> None:
    path = models.save_model(tmp_path, "llama", tie_word_embeddings=True)
    state = state_of(path)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] * (1 + 1e-5)
    save(state, path / "model.safetensors")
    for dtype in ("float32", "bfloat16"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        with Engine.from_pretrained(str(path), policy={"device": "cpu", "dtype": dtype}) as engine:
            assert engine.parts.model.is_tied == (model.lm_head.weight is model.model.embed_tokens.weight)


def test_two_tables_are_placed_as_two(tmp_path: Path) -> None:
    path = models.save_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    state = state_of(path)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].flip(0).contiguous()
    save(state, path / "model.safetensors")
    expected = models.reference_logprobs(by_default(path), PROMPT)
    offload = {"offload-dir": str(tmp_path / "offload"), "percent": [34, 33, 100, 0, 100, 0]}
    assert found(path, **offload) == pytest.approx(expected, abs=1e-4)


def test_unexpected_tensors_are_told_in_a_line(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """But for those that the family knows: `inv_freq` was in old checkpoints."""
    extra = {
        "model.layers.0.self_attn.q_proj.bias": torch.ones(64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    save(state_of(directory) | extra, directory / "model.safetensors")
    with caplog.at_level(logging.WARNING, logger="engine"):
        assert_as_transformers(directory)
    (told,) = [record.getMessage() for record in caplog.records if record.name.startswith("engine")]
    assert "hold 1 tensors that LlamaForCausalLM does not know" in told
    assert "q_proj.bias" in told
    assert "inv_freq" not in told
    assert str(directory) in told


def test_an_adapter_beside_a_model_is_not_applied_and_told(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As `from_pretrained` leaves it out where the peft package is not installed."""
    expected = models.reference_logprobs(by_default(directory), PROMPT)
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(directory)}))
    save({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 64)}, directory / "adapter_model.safetensors")
    with caplog.at_level(logging.WARNING, logger="engine"):
        assert found(directory) == pytest.approx(expected, abs=1e-4)
    (told,) = [record.getMessage() for record in caplog.records if record.name.startswith("engine")]
    assert "adapter_config.json describes is not applied" in told


CODES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32, torch.bool]


@pytest.mark.parametrize("dtype", CODES)
def test_codes_for_plain_parameters_are_refused(dtype: torch.dtype, directory: Path) -> None:
    name, state = "model.layers.1.mlp.up_proj.weight", state_of(directory)
    state[name] = state[name].to(dtype)
    save(state, directory / "model.safetensors")
    with pytest.raises(
        UnsupportedError, match=rf"{name} is stored as {str(dtype).removeprefix('torch.')} .*config.json"
    ):
        found(directory)


def test_codes_for_merged_experts_are_refused(build: Build, tmp_path: Path) -> None:
    path = Path(shutil.copytree(build("mixtral"), tmp_path / "model"))
    state = state_of(path)
    name = next(name for name in state if ".experts.2.w1" in name)
    save(state | {name: state[name].to(torch.float8_e4m3fn)}, path / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"experts.2.w1.weight is stored as float8_e4m3fn"):
        found(path)


def transposed(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda state: state.update({name: state[name].t().contiguous()})


_EXPERT = "model.layers.1.block_sparse_moe.experts"
EXPERTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "one of another shape": (transposed(f"{_EXPERT}.2.w1.weight"), r"experts\.2\.w1\.weight is \[64, 128\]"),
    "the first of another shape": (transposed(f"{_EXPERT}.0.w3.weight"), r"experts\.0\.w3\.weight is \[64, 128\]"),
    "one without a matrix": (lambda state: state.pop(f"{_EXPERT}.3.w3.weight"), r"3 of .*w3.* as many of each"),
    "all of another shape": (
        lambda state: [transposed(f"{_EXPERT}.{each}.w1.weight")(state) for each in range(4)],
        r"cannot be made of .*experts\.0\.w1\.weight \[64, 128\]",
    ),
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_that_cannot_be_merged_are_refused_before_they_are_read(
    kind: str, build: Build, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(build("mixtral"), tmp_path / "model"))
    change, expected = EXPERTS[kind]
    state = state_of(path)
    change(state)
    save(state, path / "model.safetensors")
    model = CausalModel(path, torch.float32, torch.device("cpu"))
    with pytest.raises(CheckpointError, match=expected) as caught:
        check_checkpoint(path, model)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


OUTSIDE: dict[str, Any] = {
    "../other/model.safetensors": "no file inside the model's directory",
    "/etc/model.safetensors": "no file inside the model's directory",
    "a/../../b.safetensors": "no file inside the model's directory",
    "x" * 5000 + ".safetensors": "no file inside the model's directory",
    "model.bin": r"a \*.safetensors file is expected",
    "": r"a \*.safetensors file is expected",
    7: r"is 7; the name of a \*.safetensors file is expected",
    None: r"is None; the name of a \*.safetensors file is expected",
}


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: str(name)[:20])
def test_an_index_names_files_inside(name: Any, directory: Path) -> None:
    (directory.parent / "other").mkdir()
    listed: dict[str, Any] = dict.fromkeys(state_of(directory), name)
    (directory / "model.safetensors").rename(directory.parent / "other" / "model.safetensors")
    write_index(directory, "safetensors", listed)
    with pytest.raises(CheckpointError, match=OUTSIDE[name]) as caught:
        describe(str(directory))
    assert "model.safetensors.index.json" in str(caught.value)


def test_weights_of_the_config_are_inside(directory: Path) -> None:
    edit_config(directory, transformers_weights="../x.safetensors")
    with pytest.raises(CheckpointError, match=r"config.json names '../x.safetensors'"):
        describe(str(directory))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["deepseek-v3", "gpt-oss", "llama"])
def test_what_a_family_keeps_in_float32_stays_so(family: str, dtype: torch.dtype, build: Build) -> None:
    """Norms in float16 and routers in either, by the family's own lists: as `from_pretrained` has them."""
    reference = AutoModelForCausalLM.from_pretrained(build(family), dtype=dtype).state_dict()
    state = CausalModel(build(family), dtype, torch.device("cpu")).state
    assert {name: each.dtype for name, each in state.items()} == {name: each.dtype for name, each in reference.items()}
