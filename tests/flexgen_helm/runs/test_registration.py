"""A model's HELM entries follow from its files, and reach a user's YAML without touching what stands there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import loras
import pytest
import yaml
from ggufs import save_gguf
from helm.benchmark import model_deployment_registry, model_metadata_registry, tokenizer_config_registry
from helm.benchmark.tokenizer_config_registry import TokenizerConfig, TokenizerSpec
from helm.common.cache import BlackHoleCacheConfig
from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import Policy
from engine.checkpoint.adapters.located import locate
from engine.errors import CheckpointError, ConfigError, UnsupportedError
from flexgen_helm.client import FlexGenClient
from flexgen_helm.runs import registration, yaml_lists
from flexgen_helm.runs.models import Models, refuse_code_of_tokenizer
from flexgen_helm.runs.registration import Entries, entries_for, merge_into_local_path, register_in_process
from flexgen_helm.runs.yaml_lists import add_to_yaml_lists

FILES = {"model_metadata": "models", "tokenizer_configs": "tokenizer_configs", "model_deployments": "model_deployments"}


def read(local_path: Path, file: str) -> Any:
    return yaml.safe_load((local_path / f"{file}.yaml").read_text())


@pytest.fixture
def entries(tiny_llama: Path) -> Entries:
    return entries_for(str(tiny_llama), policy={"percent": [20, 80, 0, 100, 0, 100]})


def test_entries_of_a_directory(tiny_llama: Path, entries: Entries) -> None:
    assert entries.model.name == "local/tiny-llama" == entries.tokenizer.name == entries.deployment.tokenizer_name
    assert entries.deployment.name == "flexgen/tiny-llama"
    assert entries.deployment.max_sequence_length == 512
    assert entries.deployment.client_spec.class_name == "flexgen_helm.client.FlexGenClient"
    assert entries.deployment.client_spec.args == {
        "pretrained_model_name_or_path": str(tiny_llama),
        "policy": {"percent": [20, 80, 0, 100, 0, 100]},
    }
    assert (entries.tokenizer.end_of_text_token, entries.tokenizer.prefix_token) == ("</s>", "</s>")


def test_a_chat_template_is_looked_for_without_weights(
    tiny_chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache has the model's other files only; HELM may know the model already, or not."""
    folder = tmp_path / "models--org--tiny"
    shutil.copytree(tiny_chat, folder / "snapshots" / "1", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    entries = entries_for("org/tiny")
    assert registration.applies_chat_template(entries.deployment, "org/tiny")
    register_in_process(entries)
    models = Models(policy=None)
    assert models.target("org/tiny").model_deployment == entries.deployment.name
    assert (list(models.problems()), models.notes) == ([], [])


def test_a_revision_is_a_model_of_its_own(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HELM finds the tokenizer of the same revision by itself, under a name that is that revision's."""
    folder = tmp_path / "models--org--tiny"
    for number, revision in enumerate(("main", "refs/pr/1")):
        copy = shutil.copytree(tiny_llama, folder / "snapshots" / str(number))
        tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
        (copy / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "model_max_length": 100 + number}))
        (folder / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(str(number))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    plain, other = entries_for("org/tiny"), entries_for("org/tiny@refs/pr/1")
    assert (plain.model.name, other.model.name) == ("org/tiny", "org/tiny@refs-pr-1")
    assert other.deployment.name == "flexgen/tiny@refs-pr-1"
    assert registration.source_of(other.deployment) == "org/tiny@refs/pr/1"
    for number, entries in enumerate((plain, other)):
        with HuggingFaceTokenizer.create_tokenizer(**entries.tokenizer.tokenizer_spec.args) as tokenizer:
            assert tokenizer.model_max_length == 100 + number
    register_in_process(other)
    models = Models(policy=None)
    assert models.target("org/tiny@refs-pr-1").model_deployment == other.deployment.name
    assert (list(models.problems()), models.notes) == ([], [])


def test_a_deployment_may_name_its_revision_as_those_of_helm_do(entries: Entries) -> None:
    args = {"pretrained_model_name_or_path": "org/tiny", "revision": "v2"}
    spec = replace(entries.deployment.client_spec, args=args)
    assert registration.source_of(replace(entries.deployment, client_spec=spec)) == "org/tiny@v2"
    tokenizer: Any = SimpleNamespace(get_wrapped_tokenizer=None)
    assert FlexGenClient(BlackHoleCacheConfig(), tokenizer, **args)._model == "org/tiny@v2"
    odd = replace(spec, args={**args, "pretrained_model_name_or_path": "org/tiny@v1"})
    with pytest.raises(ConfigError, match="revision 'v2': model 'org/tiny@v1' names revision 'v1' itself"):
        registration.source_of(replace(entries.deployment, client_spec=odd))


def test_entries_as_they_are_asked_for(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_llama.parent)
    (tiny_llama.parent / "policy.yaml").write_text("gpu-batch-size: 4")
    entries = entries_for(
        "tiny-llama", name="me/mine", policy="policy.yaml", max_sequence_length=100, apply_chat_template=False, top_k=5
    )
    assert (entries.model.name, entries.deployment.name) == ("me/mine", "flexgen/mine")
    assert entries.deployment.max_sequence_length == 100
    assert entries.deployment.client_spec.args == {
        "pretrained_model_name_or_path": str(tiny_llama),  # whatever directory HELM is run from
        "policy": str(tiny_llama.parent / "policy.yaml"),
        "apply_chat_template": False,
        "top_k": 5,
    }
    policy = Policy.load({"gpu-batch-size": 4})
    assert entries_for("tiny-llama", policy=policy).deployment.client_spec.args["policy"] == {"gpu-batch-size": 4}
    assert entries_for("tiny-llama", policy=Policy()).deployment.client_spec.args["policy"] == "auto"


def test_an_adapter_is_registered_by_its_own_name_with_the_tokenizer_that_there_is(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """HELM loads tokenizers by itself, and knows nothing of adapters."""
    lora = loras.save_adapter(tmp_path / "my-lora", tiny_llama, loras.QUERIES[:2])
    entries = entries_for(str(lora))
    assert entries.model.name == "local/my-lora"
    assert entries.deployment.client_spec.args["pretrained_model_name_or_path"] == str(lora)
    assert entries.tokenizer.tokenizer_spec.args["pretrained_model_name_or_path"] == str(tiny_llama)
    shutil.copy(tiny_llama / "tokenizer.json", lora)
    shutil.copy(tiny_llama / "tokenizer_config.json", lora)
    args = entries_for(str(lora)).tokenizer.tokenizer_spec.args
    assert args["pretrained_model_name_or_path"] == str(lora)
    with HuggingFaceTokenizer.create_tokenizer(**args) as tokenizer:
        assert tokenizer.eos_token == "</s>"


def test_the_tokenizer_of_a_file_is_of_its_state_now(tmp_path: Path) -> None:
    """HELM loads it from what was made of the file, which is something else for each of its states."""
    file = save_gguf(tmp_path / "changing.gguf", "llama", "Q8_0")
    first = Models(policy=None)
    names = first.target(str(file))
    first.write(str(tmp_path / "prod_env"))
    os.utime(file, (1, 1))
    for named in (str(file), names.model):  # looked up as new, and as HELM knows it
        os.utime(file, (len(named), 1))
        now = Models(policy=None)
        assert now.target(named) == names
        assert (list(first.problems()), list(now.problems())) == ([], [])
        spec = tokenizer_config_registry.get_tokenizer_config(names.model).tokenizer_spec
        assert spec.args["pretrained_model_name_or_path"] == str(locate(str(file)).path)


def test_a_directory_name_that_helm_could_not_parse_is_rewritten(tiny_llama: Path, tmp_path: Path) -> None:
    odd = shutil.copytree(tiny_llama, tmp_path / "my model, v=2")
    assert entries_for(str(odd)).model.name == "local/my-model-v-2"


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_lossless_weights_are_registered_where_the_model_may_be_computed_in_bfloat16(
    tiny_llama: Path, dtype: str
) -> None:
    policy = {"compress-weight": "lossless", "dtype": dtype}
    args = entries_for(str(tiny_llama), policy=policy).deployment.client_spec.args
    assert Policy.load(args["policy"]) == Policy(compress_weight="lossless", dtype=dtype)
    for other in ("float16", "float32"):
        with pytest.raises(UnsupportedError, match=f"lossless takes bfloat16, and the model is computed in {other};"):
            entries_for(str(tiny_llama), policy={**policy, "dtype": other})


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"name": "no-slash"}, "organization/model"),
        ({"name": "a/b,c"}, "organization/model"),
        ({"policy": "no-such-policy"}, "no-such-policy"),
        ({"max_sequence_length": 0}, "max_sequence_length 0 .* below 1"),
    ],
)
def test_wrong_wishes_are_one_line(tiny_llama: Path, fields: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        entries_for(str(tiny_llama), **fields)


def test_a_directory_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing-here"):
        entries_for(str(tmp_path / "nothing-here"))


# In this process


def test_registering_makes_the_deployment_the_one_to_run_and_keeps_model_and_tokenizer(tiny_llama: Path) -> None:
    first = entries_for(str(tiny_llama), name="test/registering", policy="auto")
    second = entries_for(str(tiny_llama), name="test/registering", policy={"gpu-batch-size": 2})
    register_in_process(first)
    register_in_process(second)
    registered = model_deployment_registry.get_model_deployment("flexgen/registering")
    assert registered.client_spec.args["policy"] == {"gpu-batch-size": 2}
    names = [each.name for each in model_deployment_registry.ALL_MODEL_DEPLOYMENTS]
    assert names.count("flexgen/registering") == 1
    assert model_deployment_registry.get_default_model_deployment_for_model("test/registering") == registered.name
    assert tokenizer_config_registry.get_tokenizer_config("test/registering") is first.tokenizer
    models = [each.name for each in model_metadata_registry.ALL_MODELS_METADATA]
    assert models.count("test/registering") == 1


# In a user's files


def test_helm_reads_back_what_was_written(entries: Entries, tmp_path: Path) -> None:
    assert merge_into_local_path(entries, tmp_path / "new" / "prod_env") == []
    local_path = tmp_path / "new" / "prod_env"
    model_metadata_registry.register_model_metadata_from_path(str(local_path / "model_metadata.yaml"))
    tokenizer_config_registry.register_tokenizer_configs_from_path(str(local_path / "tokenizer_configs.yaml"))
    model_deployment_registry.register_model_deployments_from_path(str(local_path / "model_deployments.yaml"))
    assert model_deployment_registry.get_model_deployment("flexgen/tiny-llama") == entries.deployment
    assert tokenizer_config_registry.get_tokenizer_config("local/tiny-llama") == entries.tokenizer
    read_back = model_metadata_registry.get_model_metadata("local/tiny-llama")
    assert (read_back.display_name, read_back.tags) == (entries.model.display_name, entries.model.tags)


def test_merging_again_changes_nothing(entries: Entries, tmp_path: Path) -> None:
    merge_into_local_path(entries, tmp_path)
    before = {file: (tmp_path / f"{file}.yaml").read_bytes() for file in FILES}
    assert merge_into_local_path(entries, tmp_path) == []
    assert before == {file: (tmp_path / f"{file}.yaml").read_bytes() for file in FILES}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{file}.yaml" for file in FILES)


def test_an_entry_of_an_earlier_version_is_the_same_entry(entries: Entries, tmp_path: Path) -> None:
    """They did not write down that code of a model's directory is refused."""
    merge_into_local_path(entries, tmp_path)
    file = tmp_path / "tokenizer_configs.yaml"
    content = yaml.safe_load(file.read_text())
    args = content["tokenizer_configs"][0]["tokenizer_spec"]["args"]
    assert args.pop("trust_remote_code") is False
    file.write_text(yaml.safe_dump(content))
    before = file.read_bytes()
    assert merge_into_local_path(entries, tmp_path) == []
    for other in ({"trust_remote_code": True}, {"use_fast": False}):
        content["tokenizer_configs"][0]["tokenizer_spec"]["args"] = {**args, **other}
        file.write_text(yaml.safe_dump(content))
        (line,) = merge_into_local_path(entries, tmp_path)
        assert "has another entry" in line
    file.write_bytes(before)
    assert merge_into_local_path(entries, tmp_path) == []


def test_an_entry_of_the_user_is_kept_and_named(tiny_llama: Path, entries: Entries, tmp_path: Path) -> None:
    merge_into_local_path(entries, tmp_path)
    before = (tmp_path / "model_deployments.yaml").read_bytes()
    (notice,) = merge_into_local_path(entries_for(str(tiny_llama), policy="auto"), tmp_path)
    assert "model_deployments.yaml has another entry flexgen/tiny-llama" in notice
    assert (tmp_path / "model_deployments.yaml").read_bytes() == before


def test_models_and_tokenizers_that_helm_ships_are_left_to_helm(tiny_llama: Path, tmp_path: Path) -> None:
    merge_into_local_path(entries_for(str(tiny_llama), name="meta/opt-66b"), tmp_path / "a")
    assert sorted(path.stem for path in (tmp_path / "a").iterdir()) == ["model_deployments", "tokenizer_configs"]
    merge_into_local_path(entries_for(str(tiny_llama), name="facebook/opt-66b"), tmp_path / "b")
    assert sorted(path.stem for path in (tmp_path / "b").iterdir()) == ["model_deployments", "model_metadata"]


ENTRY = {"name": "new/one", "args": {"percent": [1, 2], "text": "a: b # c"}}
USERS_FILES = [
    "",
    "# only a comment\n",
    "# head\nthings:\n  # about a\n  - name: a/b  # why\n    args: {x: 1}\n\n  - name: c/d\n# tail\n",
    "things:\n- name: a/b\n  note: |\n    text\n    more\n- name: c/d\nother: 1\n",
    "things:\nother: [1]\n",
    "things: []  # none yet\nother: 1\n",
    "things: [\n]\nother: 1\n",
    "things: [{name: a/b}, {name: c/d}]\n",
    "other: {a: 1}",
    "{things: [{name: a/b}], other: 1}\n",
    "---\nthings:\n    - name: a/b\n",
    '{"things": [{"name": "a/b"}]}',
    "things:\n  - {name: a/b, deep: {x: [1, 2]}}\n  - &anchor\n    name: c/d\n  - <<: *anchor\n    name: e/f\n",
    "things:",
    "# ü\nthings:\n  - name: ü/b\r\n",
]


@pytest.mark.parametrize("text", USERS_FILES)
def test_adding_keeps_every_line_of_the_user(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(text.encode())
    before = yaml.safe_load(text) or {}
    assert add_to_yaml_lists([(path, "things", ENTRY)]) == []
    after = yaml.safe_load(path.read_text())
    assert after.pop("things") == [ENTRY, *(before.pop("things", None) or [])]
    assert after == before
    new = path.read_text()
    for comment in [line[line.index("#") :] for line in text.splitlines() if "#" in line]:
        assert comment in new
    kept = iter(new.replace("\n", ""))
    assert all(letter in kept for letter in text.replace("\r", "").replace("\n", ""))


@settings(max_examples=50, deadline=None)
@given(
    names=st.lists(st.text("abc/-", min_size=1, max_size=6), unique=True, max_size=6),
    indent=st.integers(0, 4),
    comments=st.booleans(),
)
def test_any_number_of_entries_can_be_added(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], indent: int, comments: bool
) -> None:
    path = tmp_path_factory.mktemp("lists") / "file.yaml"
    blank = " " * indent
    lines = [f"{blank}# {name}\n{blank}- name: '{name}'\n" for name in names]
    path.write_text("things:\n" + "".join(lines))
    for count in range(3):
        add_to_yaml_lists([(path, "things", {"name": f"new {count}"})])
    expected = ["new 2", "new 1", "new 0", *names]
    assert [entry["name"] for entry in yaml.safe_load(path.read_text())["things"]] == expected
    assert "".join(lines) in path.read_text()


@pytest.mark.parametrize("text", ["things: {a: 1}\n", "- a\n", "things: [\n", "{a: 1}\n", "just words\n"])
def test_a_file_that_cannot_be_extended_is_left_alone(entries: Entries, tmp_path: Path, text: str) -> None:
    (tmp_path / "model_deployments.yaml").write_text(text.replace("things", "model_deployments"))
    with pytest.raises(ConfigError, match=r"model_deployments.yaml") as caught:
        merge_into_local_path(entries, tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model_deployments.yaml"]
    assert (tmp_path / "model_deployments.yaml").read_text() == text.replace("things", "model_deployments")


def test_a_directory_that_cannot_be_written_is_one_line(entries: Entries, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot (read|write) .*file"):
        merge_into_local_path(entries, tmp_path / "file" / "prod_env")


def test_a_crash_leaves_the_old_file_whole(entries: Entries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model_metadata.yaml"
    path.write_text("models:\n- name: a/b\n")
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        merge_into_local_path(entries, tmp_path)
    assert path.read_text() == "models:\n- name: a/b\n"
    assert [each.name for each in tmp_path.iterdir()] == ["model_metadata.yaml"]


def test_a_link_stays_a_link(entries: Entries, tmp_path: Path) -> None:
    (tmp_path / "real.yaml").write_text("models:\n- name: a/b\n")
    (tmp_path / "model_metadata.yaml").symlink_to("real.yaml")
    merge_into_local_path(entries, tmp_path)
    assert (tmp_path / "model_metadata.yaml").is_symlink()
    assert len(read(tmp_path, "real")["models"]) == 2


def test_processes_that_register_at_once_lose_nothing(tmp_path: Path) -> None:
    """Eight of them begin together, each with an entry of its own."""
    program = """
import sys, time
from pathlib import Path
from flexgen_helm.runs.yaml_lists import add_to_yaml_lists
name, start, folder = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
time.sleep(max(0.0, start - time.time()))
add_to_yaml_lists([(folder / "models.yaml", "models", {"name": f"local/{name}-{each}"}) for each in range(5)])
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    start = str(time.time() + 2.0)
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(number), start, str(tmp_path / "env")], env=environment)
        for number in range(8)
    ]
    assert [writer.wait() for writer in writers] == [0] * 8
    names = [entry["name"] for entry in yaml.safe_load((tmp_path / "env" / "models.yaml").read_text())["models"]]
    assert sorted(names) == sorted(f"local/{number}-{each}" for number in range(8) for each in range(5))
    assert [file.name for file in (tmp_path / "env").iterdir()] == ["models.yaml"]


def test_a_register_that_is_kept_waiting_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_lists, "_WAIT_S", 0.05)
    with yaml_lists._held({tmp_path}), pytest.raises(ConfigError, match="another process has been adding entries"):
        yaml_lists.add_to_yaml_lists([(tmp_path / "models.yaml", "models", {"name": "a/b"})])


def test_a_tokenizer_of_an_older_file_is_not_asked_about_either(tiny_llama: Path) -> None:
    spec = TokenizerSpec(class_name=registration.TOKENIZER, args={"pretrained_model_name_or_path": str(tiny_llama)})
    tokenizer_config_registry.register_tokenizer_config(TokenizerConfig(name="older/tokenizer", tokenizer_spec=spec))
    refuse_code_of_tokenizer("older/tokenizer")
    known = tokenizer_config_registry.TOKENIZER_NAME_TO_CONFIG["older/tokenizer"].tokenizer_spec.args
    assert known == {**(spec.args or {}), "trust_remote_code": False}
