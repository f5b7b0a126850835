"""Protects: every usual form of checkpoint loads to the same model, and a damaged or unfit one is refused in a line."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from engine import Engine, EngineError, Job, Policy
from engine.checkpoint.description import describe
from engine.checkpoint.identity.result import result_identity
from engine.checkpoint.model_class import read_model
from engine.errors import CheckpointError, UnsupportedError

Build = Callable[[str], Path]
PROMPT = [*range(20, 40), 7]
POLICIES: dict[str, dict[str, Any]] = {"device": {}, "thirds": {"percent": [34, 33, 100, 0, 100, 0]}}


def logprobs_of(directory: Path, offload: Path, **policy: Any) -> list[float]:
    """Log-probabilities of the prompt's tokens, the engine's."""
    settings = {"device": "cpu", "offload-dir": str(offload), **policy}
    with Engine.from_pretrained(str(directory), policy=settings) as engine:
        [done] = engine.run([Job(prompt=PROMPT, max_new_tokens=0, prompt_logprobs=True)])
    assert done.prompt_logprobs is not None
    return [value for value in done.prompt_logprobs if value is not None]


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def state_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def replace_weights(directory: Path, state: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / "model.safetensors")


def shard(directory: Path, size: str = "60KB") -> Path:
    """Rewrite a directory's weights as several shards with an index."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size=size)
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def to_bin(directory: Path, rename: Callable[[str], str] = str) -> Path:
    """Rewrite a directory's weights as the `.bin` of older times."""
    state = {rename(name): tensor for name, tensor in state_of(directory).items()}
    torch.save(state, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return directory


def old_opt_name(name: str) -> str:
    """As in the hub's OPT checkpoints."""
    return name.removeprefix("model.")


def to_old_gpt2(directory: Path) -> None:
    """As on the hub: names without their first part, and masks that no model has any more."""
    to_bin(directory, lambda name: name.removeprefix("transformer."))
    state = torch.load(directory / "pytorch_model.bin")
    state["h.0.attn.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.bool)
    state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, directory / "pytorch_model.bin")


FORMS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "one file": ("llama", lambda directory: None),
    "shards": ("llama", shard),
    "shards of Mixtral's experts": ("mixtral", shard),
    "bin": ("llama", to_bin),
    "bin of OPT with old names": ("opt", lambda directory: to_bin(directory, old_opt_name)),
    "bin of GPT-2 with old names": ("gpt2", to_old_gpt2),
    "bin of OPT with post-norm": ("opt-post-norm", lambda directory: to_bin(directory, old_opt_name)),
}


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_gives_the_same_model(form: str, policy: str, build: Build, tmp_path: Path) -> None:
    family, transform = FORMS[form]
    directory = copy(build(family), tmp_path / "model")
    expected = models.reference_logprobs(models.load_reference(directory), PROMPT)
    transform(directory)
    found = logprobs_of(directory, tmp_path / "offload", **POLICIES[policy])
    assert found == pytest.approx(expected, abs=1e-4)


def test_bin_in_shards(build: Build, tmp_path: Path) -> None:
    directory = copy(build("llama"), tmp_path / "model")
    expected = models.reference_logprobs(models.load_reference(directory), PROMPT)
    state = list(state_of(directory).items())
    (directory / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for number in (1, 2):
        part, name = dict(state[number - 1 :: 2]), f"pytorch_model-0000{number}-of-00002.bin"
        torch.save(part, directory / name)
        index |= dict.fromkeys(part, name)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert logprobs_of(directory, tmp_path / "offload") == pytest.approx(expected, abs=1e-4)


def test_mixtral_is_saved_expert_by_expert(build: Build) -> None:
    """What the parity tests of Mixtral load is the hub's layout: three matrices of each expert."""
    names = state_of(build("mixtral"))
    assert sum(".experts.3.w" in name for name in names) == 3 * 3


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("tied", [True, False])
def test_heads_tied_or_not(tied: bool, policy: str, tmp_path: Path) -> None:
    directory = models.save_model(tmp_path / "model", "llama", tie_word_embeddings=tied)
    assert ("lm_head.weight" in state_of(directory)) != tied
    expected = models.reference_logprobs(models.load_reference(directory), PROMPT)
    assert logprobs_of(directory, tmp_path / "offload", **POLICIES[policy]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kept", ["both", "lm_head.weight"])
def test_a_tied_pair_may_be_stored_twice_or_under_the_head_s_name(kept: str, tmp_path: Path) -> None:
    directory = models.save_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    expected = models.reference_logprobs(models.load_reference(directory), PROMPT)
    state = state_of(directory)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    if kept != "both":
        del state["model.embed_tokens.weight"]
    replace_weights(directory, state)
    assert logprobs_of(directory, tmp_path / "offload") == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("policy", list(POLICIES))
def test_half_precision_runs_in_float32(stored: torch.dtype, policy: str, tmp_path: Path) -> None:
    directory = models.save_model(tmp_path / "model", "llama")
    AutoModelForCausalLM.from_pretrained(directory, dtype=stored).save_pretrained(directory)
    assert describe(str(directory)).dtype == str(stored).removeprefix("torch.")
    expected = models.reference_logprobs(models.load_reference(directory), PROMPT)  # float32, of the same weights
    found = logprobs_of(directory, tmp_path / "offload", **POLICIES[policy])
    assert found == pytest.approx(expected, abs=1e-4)


def test_description(build: Build) -> None:
    found = describe(str(build("llama")))
    assert found.path == str(build("llama"))
    assert (found.model_type, found.window, found.dtype, found.num_layers) == ("llama", models.WINDOW, "float32", 3)
    assert found.weight_bytes == sum(tensor.nbytes for tensor in state_of(build("llama")).values())


def test_identity_knows_weights_tokenizer_and_dtype_but_not_placement(build: Build, tmp_path: Path) -> None:
    directory = copy(build("llama"), tmp_path / "model")

    def identity(**policy: Any) -> dict[str, str | int | None]:
        return result_identity(str(directory), Policy.from_mapping({"device": "cpu", **policy}))

    first = identity()
    assert first == identity(percent=[0, 100, 0, 100, 0, 100], **{"gpu-batch-size": 3, "share-prefix": False})
    assert first == result_identity(str(build("llama")), Policy.from_mapping({"device": "cpu"}))  # wherever it lies
    assert first != identity(dtype="bfloat16")
    assert first != identity(**{"compress-cache": 4})
    assert first != identity(**{"batch-invariant": True})
    assert first == identity(**{"batch-invariant": False})
    assert first == identity(**{"draft-model": "some/model"})  # whatever it drafts
    state = state_of(directory)
    replace_weights(directory, state)
    before = identity()
    state["model.layers.1.mlp.up_proj.weight"] += 1e-3
    replace_weights(directory, state)
    second = identity()
    assert second["weights"] != before["weights"]
    edit_json(directory / "tokenizer.json", truncation={"direction": "Left"})
    third = identity()
    assert third["files"] != second["files"]
    assert third["weights"] == second["weights"]


# Bad input. Each breaks a good directory; the message must be one line with these parts in it.


def cut_tail(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def cut_header(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def damage_header(directory: Path) -> None:
    file = directory / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:12] = b"\xff\xfe{{"
    file.write_bytes(content)


def replace_header(directory: Path) -> None:
    file = directory / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    file.write_bytes(content[:8] + b'{"a": [1]}'.ljust(length) + content[8 + length :])


def empty_file(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"")


def lose_shard(directory: Path) -> None:
    shard(directory)
    min(directory.glob("*.safetensors")).unlink()


def cut_shard(directory: Path) -> None:
    shard(directory)
    file = max(directory.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-50])


def list_what_is_not_there(directory: Path) -> None:
    shard(directory)
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.9.mlp.up_proj.weight"] = min(content["weight_map"].values())
    index.write_text(json.dumps(content))


def other_shapes(directory: Path) -> None:
    edit_json(directory / "config.json", intermediate_size=96)


def more_layers(directory: Path) -> None:
    edit_json(directory / "config.json", num_hidden_layers=5)


def drop_tensor(directory: Path) -> None:
    state = state_of(directory)
    del state["model.layers.1.self_attn.q_proj.weight"]
    replace_weights(directory, state)


class Payload:
    """Runs code when an open pickle loads it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("/nonexistent/touched"),)


def pickle_an_object(directory: Path) -> None:
    torch.save({**state_of(directory), "extra": Payload()}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def pickle_plainly(directory: Path) -> None:
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Payload()}))
    (directory / "model.safetensors").unlink()


def cut_bin(directory: Path) -> None:
    to_bin(directory)
    file = directory / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-5000])


def remove(*names: str) -> Callable[[Path], None]:
    def unlink(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return unlink


def write(name: str, content: str) -> Callable[[Path], None]:
    def overwrite(directory: Path) -> None:
        (directory / name).write_text(content)

    return overwrite


def write_index(content: str) -> Callable[[Path], None]:
    """In place of a single file, which would be taken before any index."""

    def overwrite(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
        (directory / "model.safetensors.index.json").write_text(content)

    return overwrite


BAD: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (remove("config.json"), ["config.json"]),
    "config is not JSON": (write("config.json", "{"), ["config.json", "cannot be read"]),
    "config of something else": (write("config.json", '{"a": 1}'), ["model_type"]),
    "no tokenizer": (remove("tokenizer.json"), ["no tokenizer"]),
    "damaged tokenizer": (write("tokenizer.json", "{}"), ["tokenizer"]),
    "no weights": (remove("model.safetensors"), ["no weights", "safetensors"]),
    "truncated": (cut_tail, ["model.safetensors", "truncated", "bytes instead of"]),
    "truncated header": (cut_header, ["model.safetensors", "truncated", "100 bytes"]),
    "damaged header": (damage_header, ["model.safetensors", "damaged"]),
    "header of something else": (replace_header, ["model.safetensors", "damaged"]),
    "empty file": (empty_file, ["model.safetensors", "truncated", "0 bytes"]),
    "missing shard": (lose_shard, ["lacks 1 of", "model-00001-of-"]),
    "truncated shard": (cut_shard, ["truncated", "bytes instead of"]),
    "index lists more": (list_what_is_not_there, ["1 tensors", "model.layers.9.mlp.up_proj.weight"]),
    "index is not JSON": (write_index("{"), ["model.safetensors.index.json"]),
    "index without a map": (write_index('{"weight_map": 3}'), ["model.safetensors.index.json", "weight_map is 3"]),
    "other shapes": (other_shapes, ["[64, 128]", "[64, 96]", "down_proj.weight", "config.json"]),
    "missing tensors": (more_layers, ["lack 18 of 48", "model.layers.3"]),
    "missing tensor": (drop_tensor, ["lack 1 of 30", "model.layers.1.self_attn.q_proj.weight"]),
    "a pickle that would run code": (pickle_an_object, ["pytorch_model.bin", "weights_only", "safetensors"]),
    "a plain pickle": (pickle_plainly, ["pytorch_model.bin"]),
    "truncated bin": (cut_bin, ["pytorch_model.bin"]),
}


def refused(directory: Path | str, kind: type[EngineError], offload: Path) -> str:
    """The one line with which the engine refuses a model."""
    policy = {"device": "cpu", "percent": [0, 0, 0, 0, 0, 0], "offload-dir": str(offload)}
    with pytest.raises(kind) as caught:
        Engine.from_pretrained(str(directory), policy=policy)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert not offload.exists() or list(offload.iterdir()) == []
    return str(caught.value)


@pytest.mark.parametrize("kind", list(BAD))
def test_a_damaged_directory_is_refused(kind: str, build: Build, tmp_path: Path) -> None:
    directory = copy(build("llama"), tmp_path / "model")
    BAD[kind][0](directory)
    message = refused(directory, CheckpointError, tmp_path / "offload")
    assert str(directory) in message
    assert [part for part in BAD[kind][1] if part not in message] == []


def test_what_shows_without_weights_is_found_before_they_are_read(build: Build, tmp_path: Path) -> None:
    for kind in ("no tokenizer", "no weights", "truncated", "truncated shard", "missing shard", "index lists more"):
        directory = copy(build("llama"), tmp_path / kind)
        BAD[kind][0](directory)
        with pytest.raises(CheckpointError):
            describe(str(directory))


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "model"
    assert str(missing) in refused(missing, CheckpointError, tmp_path / "offload")
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in refused(file, CheckpointError, tmp_path / "offload")


def test_a_hub_id_without_a_network_is_named(tmp_path: Path) -> None:
    message = refused("nobody/no-such-model", CheckpointError, tmp_path / "offload")
    assert "'nobody/no-such-model'" in message


SMALL = {"vocab_size": models.VOCABULARY, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
UNFIT: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "bert": (AutoModelForMaskedLM, {"intermediate_size": 32}, ["BertForMaskedLM", "not a causal language model"]),
    "t5": (
        AutoModelForSeq2SeqLM,
        {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2},
        ["T5ForConditionalGeneration", "encoder-decoder"],
    ),
    "vit": (AutoModel, {"intermediate_size": 32, "image_size": 32}, ["ViTModel", "no causal language model"]),
    "rwkv": (AutoModelForCausalLM, {}, ["rwkv"]),
}


@pytest.mark.parametrize("model_type", list(UNFIT))
def test_a_model_that_cannot_run_is_refused_by_name(model_type: str, tmp_path: Path) -> None:
    auto, changes, parts = UNFIT[model_type]
    directory = tmp_path / "model"
    auto.from_config(AutoConfig.for_model(model_type, **(SMALL | changes))).save_pretrained(directory)
    models.make_tokenizer().save_pretrained(directory)
    message = refused(directory, UnsupportedError, tmp_path / "offload")
    assert [part for part in parts if part not in message] == []


def test_quantized_checkpoints_are_refused(build: Build, tmp_path: Path) -> None:
    directory = copy(build("llama"), tmp_path / "model")
    edit_json(directory / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantized" in refused(directory, UnsupportedError, tmp_path / "offload")


def test_a_cache_that_cannot_be_encoded_is_refused(tmp_path: Path) -> None:
    directory = models.save_model(tmp_path, "llama", num_key_value_heads=1)
    with pytest.raises(UnsupportedError, match="keys and values of layer 0 are 32 numbers a token, no multiple of 64"):
        Engine.from_pretrained(str(directory), policy={"device": "cpu", "compress-cache": 8})


def test_models_load_and_run_beside_each_other_and_beside_other_modules(build: Build) -> None:
    """Building on `meta` patches a class of torch's: no other thread may notice, nor may anything stay."""
    register, done, on_meta = torch.nn.Module.register_parameter, threading.Event(), []

    def make_modules() -> None:
        while not done.is_set():
            on_meta.append(torch.nn.Linear(2, 2).weight.is_meta)

    other = threading.Thread(target=make_modules)
    other.start()
    directories = [str(build(family)) for family in ("llama", "opt", "gpt2", "qwen3")] * 2
    try:
        with ThreadPoolExecutor(4) as pool:
            engines = list(pool.map(lambda path: Engine.from_pretrained(path, policy={"device": "cpu"}), directories))
    finally:
        done.set()
        other.join()
    jobs = [Job(prompt=PROMPT, max_new_tokens=12)]
    alone = [engine.run(jobs)[0].tokens for engine in engines]
    with ThreadPoolExecutor(8) as pool:
        assert [done[0].tokens for done in pool.map(lambda engine: engine.run(jobs), engines)] == alone
    for engine in engines:
        engine.close()
    assert on_meta
    assert not any(on_meta)
    assert torch.nn.Module.register_parameter is register


def test_the_half_of_a_whole_model_is_not_read_as_the_whole(tmp_path: Path) -> None:
    """`from_pretrained` would take the half's config for the whole's, and build a model of default sizes."""
    config = {"model_type": "qwen3_vl_text", "architectures": ["Qwen3VLForConditionalGeneration"], **SMALL}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="text half of a qwen3_vl alone"):
        read_model(tmp_path)
