"""Protects: a checkpoint is known by every byte of its weights, by its tokenizer and template, and by its source."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine import Engine, EngineError, Job, Policy
from engine.checkpoint.identity import kept_digests, modelling_source, weight_digest
from engine.checkpoint.identity.kept_digests import KeptDigests
from engine.checkpoint.identity.modelling_source import source_digest, source_files
from engine.checkpoint.identity.result import differences, identity_beside_weights, result_identity
from engine.checkpoint.identity.sampled import sampled_fingerprint
from engine.checkpoint.identity.weight_digest import LEAF_BYTES, WeightDigest, weights_digest
from engine.checkpoint.opened_weights import OpenedWeights
from engine.errors import CheckpointError
from engine.memory import accelerator

Build = Callable[[str], Path]
WEIGHTS = "model.safetensors"
CPU = Policy(device="cpu")


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Digests are kept of files however new, in a directory of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_digests, "SETTLED_NS", 0)


@pytest.fixture
def model(build: Build, tmp_path: Path) -> Path:
    return Path(shutil.copytree(build("llama"), tmp_path / "model"))


def digest_of(model: Path) -> str:
    source = OpenedWeights(model)
    try:
        return weights_digest(model, source)
    finally:
        source.close()


def forget(model: Path) -> None:
    KeptDigests(model).file.unlink(missing_ok=True)


def flip(file: Path, offset: int, bits: int = 1) -> None:
    """Change a byte in its place."""
    with file.open("r+b") as stream:
        stream.seek(offset)
        (byte,) = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte ^ bits]))


def reading(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The offsets that are read for digests from now on."""
    offsets: list[int] = []
    preadv = os.preadv

    def recorded(handle: int, buffers: Any, offset: int) -> int:
        offsets.append(offset)
        return preadv(handle, buffers, offset)

    monkeypatch.setattr(weight_digest.os, "preadv", recorded)
    return offsets


# Weights


def by_hand(model: Path) -> str:
    """The digest as `WeightDigest` says that it is made."""
    whole = []
    for file in sorted(model.glob("*.safetensors")):
        content = file.read_bytes()
        leaves = [
            hashlib.sha256(content[at : at + weight_digest.LEAF_BYTES]).digest()
            for at in range(0, len(content), weight_digest.LEAF_BYTES)
        ]
        tree = hashlib.sha256(str(len(content)).encode() + b"\0" + b"".join(leaves)).hexdigest()
        whole.append([file.name, len(content), tree])
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_byte_of_every_weight_file_counts(
    data: st.DataObject, build: Build, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_digest, "LEAF_BYTES", 4096)
    model = tmp_path_factory.mktemp("sharded") / "model"
    shutil.copytree(build("llama"), model)
    state = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: state[name] for name in own}, model / file)
    weight_map = {name: file for file, own in shards.items() for name in own}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    before = digest_of(model)
    assert before == by_hand(model)
    file = model / data.draw(st.sampled_from(sorted(shards)))
    size = file.stat().st_size
    offset, bits = data.draw(st.integers(0, size - 1) | st.sampled_from([0, size - 1])), data.draw(st.integers(1, 255))
    flip(file, offset, bits)
    changed = digest_of(model)
    assert changed != before
    assert changed == by_hand(model)
    flip(file, offset, bits)
    assert digest_of(model) == before


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # the second has one table for embedding and head
def test_last_rows_of_an_embedding_count_which_a_sample_misses(family: str, build: Build, tmp_path: Path) -> None:
    model = Path(shutil.copytree(build(family), tmp_path / "model"))
    state = load_file(model / WEIGHTS)
    save_file(state, model / WEIGHTS)
    before, sampled = result_identity(str(model), CPU), sampled_fingerprint(model)
    name = next(name for name in state if name.endswith(("embed_tokens.weight", "wte.weight")))
    state[name][-2:] += 1.0
    save_file(state, model / WEIGHTS)
    assert sampled_fingerprint(model) == sampled
    after = result_identity(str(model), CPU)
    assert after["weights"] != before["weights"]
    assert {**after, "weights": None} == {**before, "weights": None}


def test_a_file_that_is_touched_or_moved_is_the_same(model: Path, tmp_path: Path) -> None:
    before = result_identity(str(model), CPU)
    os.utime(model / WEIGHTS)
    assert result_identity(str(model), CPU) == before
    assert result_identity(str(model.rename(tmp_path / "elsewhere")), CPU) == before


def test_a_kept_digest_is_not_computed_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest_of(model)
    offsets = reading(monkeypatch)
    assert digest_of(model) == before
    with Engine.from_pretrained(str(model), policy={"device": "cpu"}) as engine:
        assert engine.weights_digest() == before
    assert offsets == []


def test_of_several_files_the_changed_one_alone_is_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model, max_shard_size="200KB")
    (model / WEIGHTS).unlink()
    shards = sorted(model.glob("model-*.safetensors"))
    assert len(shards) > 2
    before = digest_of(model)
    flip(shards[1], -1 + shards[1].stat().st_size)
    offsets = reading(monkeypatch)
    assert digest_of(model) == by_hand(model) != before
    assert offsets == [0]


def test_a_change_in_place_is_noticed_even_if_the_time_of_writing_is_set_back(model: Path) -> None:
    file = model / WEIGHTS
    times = file.stat()
    before = digest_of(model)
    flip(file, times.st_size - 1)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_mtime_ns == times.st_mtime_ns
    assert digest_of(model) != before


def test_a_digest_of_a_file_that_may_change_unseen_is_not_kept(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_digests, "SETTLED_NS", 3600 * 10**9)  # a clock that ticks once in an hour
    before = digest_of(model)
    offsets = reading(monkeypatch)
    assert digest_of(model) == before
    assert offsets == [0]


def damage(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-20]),
    "empty": lambda file: file.write_bytes(b""),
    "no JSON": lambda file: file.write_bytes(b"\xff\x00"),
    "no object": lambda file: file.write_text("[]"),
    "nested deep": lambda file: file.write_text("[" * 100_000),
    "another digest": lambda file: damage(file, json.loads(file.read_text())["files"][WEIGHTS]["digest"], "0" * 64),
    "of another layout": lambda file: damage(file, '"layout": 1', '"layout": 2'),
    "of another directory": lambda file: damage(file, '"source": "', '"source": "/elsewhere'),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_kept_digests_are_computed_anew(kind: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest_of(model)
    file = KeptDigests(model).file
    good = file.read_text()
    DAMAGES[kind](file)
    offsets = reading(monkeypatch)
    assert digest_of(model) == before
    assert offsets == [0]
    assert file.read_text() == good


def test_digests_that_cannot_be_kept_are_a_notice(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kept_digests, "digests_directory", lambda: tmp_path / "file" / "digests")
    with caplog.at_level(logging.WARNING):
        assert digest_of(model) == by_hand(model)
    (told,) = (record.getMessage() for record in caplog.records if record.name.startswith("engine"))
    assert "is not kept in" in told
    assert "\n" not in told


def test_what_is_kept_of_a_directory_that_is_gone_is_removed(model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    digest_of(other)
    shutil.rmtree(other)
    assert KeptDigests(other).file.exists()
    digest_of(model)
    assert not KeptDigests(other).file.exists()
    assert KeptDigests(model).file.exists()


@pytest.mark.parametrize("how", ["written", "cut short"])
def test_a_file_that_changes_while_it_is_read_has_no_digest(how: str, model: Path) -> None:
    source = OpenedWeights(model)
    digest = WeightDigest(model, source)
    try:
        if how == "written":
            flip(model / WEIGHTS, 100_000)
        else:
            os.truncate(model / WEIGHTS, 1000)
        digest.finish()
        with pytest.raises(CheckpointError, match=r"model\.safetensors was .* start again") as caught:
            digest.wait()
        assert "\n" not in str(caught.value)
    finally:
        digest.close()
        source.close()
    assert not KeptDigests(model).file.exists()


def test_who_waits_for_a_digest_that_is_given_up_is_told(model: Path) -> None:
    source = OpenedWeights(model)
    digest = WeightDigest(model, source)
    assert not digest.is_known
    digest.close()
    digest.close()
    with pytest.raises(EngineError, match="closed before all weight files were read"):
        digest.wait()
    source.close()


def test_a_digest_that_is_given_up_within_its_last_leaf_is_not_kept(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has been read of the leaf by then is not all of it."""
    source = OpenedWeights(model)
    digest = WeightDigest(model, source)
    preadv = os.preadv

    def closing(handle: int, buffers: Any, offset: int) -> int:
        digest.give_up(EngineError("given up"))
        return preadv(handle, [buffers[0][:100]], offset)

    monkeypatch.setattr(weight_digest.os, "preadv", closing)
    digest.finish()
    with pytest.raises(EngineError, match="given up"):
        digest.wait()
    digest.close()
    source.close()
    assert not KeptDigests(model).file.exists()
    monkeypatch.setattr(weight_digest.os, "preadv", preadv)
    assert digest_of(model) == by_hand(model)


def test_files_that_have_been_closed_have_no_digest(model: Path) -> None:
    source = OpenedWeights(model)
    source.close()
    with pytest.raises(EngineError, match="the weight files have been closed"):
        weights_digest(model, source)


# While an engine loads


POLICIES: dict[str, dict[str, Any]] = {
    "on the device": {},
    "in halves": {"percent": [50, 50, 100, 0, 100, 0]},
    "on the disk": {"percent": [0, 0, 100, 0, 100, 0]},
    "partly on the disk": {"percent": [30, 33, 100, 0, 100, 0]},
    "encoded": {"compress-weight": 4},
}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("placed", POLICIES)
def test_an_engine_digests_what_it_reads(placed: str, family: str, build: Build, tmp_path: Path) -> None:
    model = Path(shutil.copytree(build(family), tmp_path / "model"))
    policy = {"device": "cpu", "offload-dir": str(tmp_path / "offload"), **POLICIES[placed]}
    for _ in range(2):  # the second start of "encoded" reads nothing of the checkpoint for its own sake
        forget(model)
        with Engine.from_pretrained(str(model), policy=policy) as engine:
            assert engine.run([Job(prompt=[10, 11, 12], max_new_tokens=2)])[0].error is None
            assert engine.weights_digest() == by_hand(model)
    assert KeptDigests(model).read().keys() == {WEIGHTS}


def test_who_waits_for_a_digest_gets_the_fault_of_a_load_that_could_not_begin(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(device: torch.device) -> None:
        if threading.current_thread().name == "flexgen-load":
            raise RuntimeError("no such device")

    monkeypatch.setattr(accelerator, "make_current", failing)
    with (
        Engine.from_pretrained(str(model), policy={"device": "cpu"}) as engine,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(engine.weights_digest)
        try:
            with pytest.raises(EngineError, match="no such device"):
                waiting.result(timeout=20)
        finally:
            engine.close()


def test_what_has_been_read_is_digested_first(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_digest, "LEAF_BYTES", 4096)
    monkeypatch.setattr(weight_digest, "_MOST_THREADS", 1)
    offsets = reading(monkeypatch)
    source = OpenedWeights(model)
    digest = WeightDigest(model, source)
    digest.follow(model / WEIGHTS, 40_000, 50_000)
    digest.follow(model / WEIGHTS, 45_000, 50_000)
    digest.follow(model / "other.safetensors", 0, 10)
    digest.finish()
    assert digest.wait() == by_hand(model)
    leaves = [offset // 4096 for offset in offsets]
    assert leaves[:4] == [9, 10, 11, 12]
    assert sorted(leaves) == list(range(-(-(model / WEIGHTS).stat().st_size // 4096)))
    digest.close()
    source.close()


def test_bin_files_have_a_digest_too(model: Path) -> None:
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()
    with Engine.from_pretrained(str(model), policy={"device": "cpu"}) as engine:
        before = engine.weights_digest()
    assert before == digest_of(model)
    flip(model / "pytorch_model.bin", (model / "pytorch_model.bin").stat().st_size // 2)
    assert digest_of(model) != before


def test_a_leaf_is_part_of_the_definition() -> None:
    assert LEAF_BYTES == 8 << 20  # answers are known by it: another size asks all requests again


# Tokenizer, template, configuration


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tools.jinja",
     "generation_config.json", "special_tokens_map.json", "merges.txt", "spm.model", "config.json"],
)  # fmt: skip
def test_files_that_change_token_ids_or_prompts_are_in_the_identity(name: str, model: Path) -> None:
    file = model / name
    file.parent.mkdir(exist_ok=True)
    before = identity_beside_weights(str(model), CPU)
    file.write_bytes(file.read_bytes() + b" \n" if file.exists() else b"{}")
    after = identity_beside_weights(str(model), CPU)
    assert after["files"] != before["files"]
    assert {**after, "files": None} == {**before, "files": None}
    os.utime(file)
    (model / "README.md").write_text("of no consequence")
    assert identity_beside_weights(str(model), CPU) == after


# The family's source


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what llama, mixtral and opt are computed by, in place of the installed package."""
    real, copied = modelling_source._package(), tmp_path / "transformers"
    kinds = ({"model_type": kind} for kind in ("llama", "mixtral", "opt"))
    for file in [*(file for kind in kinds for file in source_files(kind).values()), real / "modeling_utils.py"]:
        (copied / file.relative_to(real)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copied / file.relative_to(real))
    monkeypatch.setattr(modelling_source, "_package", lambda: copied)
    return copied


CHANGED = {
    "models/llama/modeling_llama.py": {"llama"},
    "models/llama/configuration_llama.py": {"llama"},
    "models/opt/modeling_opt.py": {"opt"},
    "models/mixtral/modeling_mixtral.py": {"mixtral"},
    "integrations/moe.py": {"mixtral"},
    "modeling_rope_utils.py": {"llama", "mixtral"},
    "activations.py": {"llama", "mixtral", "opt"},
    "masking_utils.py": {"llama", "mixtral", "opt"},
    "modeling_utils.py": set(),
}


@pytest.mark.parametrize("name", CHANGED)
def test_source_that_decides_a_family_s_numbers_is_in_its_identity(name: str, package: Path) -> None:
    families = ("llama", "mixtral", "opt")
    before = {family: source_digest({"model_type": family}) for family in families}
    with (package / name).open("a") as stream:
        stream.write("\n_CHANGED = True\n")
    after = {family: source_digest({"model_type": family}) for family in families}
    assert {family for family in families if after[family] != before[family]} == CHANGED[name]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "gpt-sw3"}, {"models.gpt2.modeling_gpt2"}),  # has no source of its own
        ({"model_type": "gemma3_text"}, {"models.gemma3.modeling_gemma3"}),
        ({"model_type": "gpt2"}, {"models.gpt2.modeling_gpt2", "pytorch_utils"}),
        ({"model_type": "gemma3", "text_config": {"model_type": "qwen3"}}, {"models.qwen3.modeling_qwen3"}),
    ],
)
def test_the_source_is_that_of_the_class_that_runs(config: dict[str, Any], expected: set[str]) -> None:
    files = source_files(config)
    assert expected <= files.keys()
    assert all(file.is_file() for file in files.values())


def test_source_that_is_not_there_is_refused(package: Path) -> None:
    shutil.rmtree(package / "models" / "opt")
    with pytest.raises(CheckpointError, match=r"the source of OPTForCausalLM is not in .*; install transformers"):
        source_digest({"model_type": "opt"})


def test_an_identity_is_known_without_the_version_of_a_package(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    before = result_identity(str(model), CPU)
    monkeypatch.setattr(transformers, "__version__", "99.0")
    assert result_identity(str(model), CPU) == before


def test_what_differs_is_told_with_both_digests() -> None:
    now = {"weights": "a" * 64, "files": "b" * 64, "source": "c" * 64, "numerics": 2}
    told = differences({**now, "weights": "d" * 64, "numerics": 1}, now)
    assert told == f"weights (sha256 {'d' * 12} then, {'a' * 12} now) and numerics (1 then, 2 now)"
    assert differences(now, now) == ""
