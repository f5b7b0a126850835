"""Protects: FlexGen's and HELM's command lines mean here what they mean there."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.policy import Policy, Share
from flexgen_helm.runs.entries import Target, assign_models, conf_path, read_entries
from flexgen_helm.runs.flags import parse_run_flags, policy_from_flags
from flexgen_helm.terminal.errors import UsageError

FLEXGEN = (
    "--description mmlu:model=text,subject=abstract_algebra,data_augmentation=canonical --pad-to-seq-len 512 "
    "--model facebook/opt-30b --percent 20 80 0 100 0 100 --gpu-batch-size 48 --num-gpu-batches 3 "
    "--max-eval-instances 100"
)


def parse(line: str) -> argparse.Namespace:
    return parse_run_flags(line.split())


def policy(line: str) -> Any:
    return policy_from_flags(parse(line))


def test_flexgens_own_command_line() -> None:
    args = parse(FLEXGEN)
    assert args.max_eval_instances == 100
    assert args.model == "facebook/opt-30b"
    assert Policy.load(policy_from_flags(args)) == Policy(
        gpu_batch_size=48,
        num_gpu_batches=3,
        weights=Share(gpu=20, cpu=80),
        kv_cache=Share(gpu=0, cpu=100),
        activations=Share(gpu=0, cpu=100),
        pad_to_seq_len=512,
    )


def test_prefixes_as_in_flexgens_scripts() -> None:
    args = parse("--description d --max-eval-instance 7 --cpu --model m/m --compress-w --run-path out")
    assert (args.max_eval_instances, args.cpu_cache_compute, args.output_path) == (7, True, "out")
    assert policy_from_flags(args) == {"cpu-cache-compute": True, "compress-weight": True}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--pin-weight", True),
        ("--pin-weight 1", True),
        ("--pin-weight true", True),
        ("--pin-weight 0", False),
        ("--pin-weight False", False),
    ],
)
def test_flexgens_booleans_take_a_value_or_none(line: str, expected: bool) -> None:
    assert policy(line) == {"pin-weight": expected}


@pytest.mark.parametrize(("line", "bits"), [("", 4), (" 1", 4), (" 4", 4), (" 8", 8), (" 0", None)])
def test_compression_takes_bits(line: str, bits: int | None) -> None:
    assert Policy.load(policy("--compress-weight" + line)).compress_weight == bits
    assert Policy.load(policy("--compress-cache" + line)).compress_cache == bits


def test_only_weights_may_be_lossless() -> None:
    assert Policy.load(policy("--compress-weight lossless")).compress_weight == "lossless"
    with pytest.raises(UsageError, match="--compress-cache: 'lossless'"):
        policy("--compress-cache lossless")


def test_first_letters_mean_what_they_did_before_there_were_memory_limits() -> None:
    assert policy("--cpu --gpu 7") == {"cpu-cache-compute": True, "gpu-batch-size": 7}
    assert policy("--cpu-m 2GB --gpu-m 1GB") == {"cpu-memory": "2GB", "gpu-memory": "1GB"}


@pytest.mark.parametrize(("size", "expected"), [("16GB", 16 * 10**9), ("16GiB", 16 * 2**30), ("0.5", 2**29)])
def test_memory_limits_override_the_policy(size: str, expected: int, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("gpu-memory: 1GB\ncpu-memory: 2GB\ndtype: float32\n")
    found = Policy.load(policy(f"--policy {file} --gpu-memory {size}"))
    assert (found.gpu_memory, found.cpu_memory, found.dtype) == (expected, 2 * 10**9, "float32")
    found = Policy.load(policy(f"--cpu-memory {size}"))
    assert (found.gpu_memory, found.cpu_memory) == (None, expected)


def test_flags_override_the_policy_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("gpu-batch-size: 5\nnum-gpu-batches: 2\nweights: {gpu: 100}\ndtype: float32\n")
    merged = Policy.load(policy(f"--policy {file} --percent 0 100 0 100 0 100 --num-gpu-batches 9"))
    assert (merged.gpu_batch_size, merged.num_gpu_batches, merged.dtype) == (5, 9, "float32")
    assert merged.weights == Share(gpu=0, cpu=100)
    assert Policy.load(policy(f"--policy {file}")).num_gpu_batches == 2


def test_a_policy_file_is_remembered_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("gpu-batch-size: 5\n")
    monkeypatch.chdir(tmp_path)
    assert policy("--policy mine.yaml") == str(tmp_path / "mine.yaml")
    assert policy("--policy opt-30b-t4") == "opt-30b-t4"
    assert policy("--model m/m") is None
    assert policy("--offload-dir here") == {"offload-dir": str(tmp_path / "here")}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--percent 20 80 0 100 0", "six numbers"),
        ("--percent 20 90 0 100 0 100", "110 percent"),
        ("--percent -5 90 0 100 0 100", "-5 percent"),
        ("--percent 20 60 0 100 0 100", "offload-dir"),
        ("--policy opt-30b-t5", "did you mean 'opt-30b-t4'"),
        ("--gpu-batch-size 0", "gpu-batch-size 0"),
        ("--pad-to-seq-len 0", "pad-to-seq-len 0"),
        ("--gpu-memory 16XB", "gpu-memory: '16XB' is not a size"),
        ("--cpu-memory 0GB", "cpu-memory: '0GB' is no memory at all"),
    ],
)
def test_flags_that_are_no_policy(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy(line)


@pytest.mark.parametrize(
    "line",
    [
        "--pad-to-seq-len wide",
        "--pin-weight perhaps",
        "--gpu-batch-size many",
        "--no-such-flag",
        "-m 0",
        "-n 0",
        "--cache-instances-only",
        "--path somewhere",
        "--model a/b --models-to-run a/b",
        "--" + "x" * 5000,
    ],
)
def test_flags_that_cannot_be_meant(line: str) -> None:
    with pytest.raises((UsageError, ConfigError)) as caught:
        parse(line)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_helms_flags_keep_their_names_and_defaults() -> None:
    from helm.benchmark.run import build_parser

    helm = vars(build_parser().parse_args(["-m", "1"]))
    ours = vars(parse("-m 1"))
    assert ours.pop("output_path") is None  # the demo has a place of its own; else benchmark_output
    assert helm.pop("output_path") == "benchmark_output"
    assert {name: ours[name] for name in helm} == helm
    assert parse("").max_eval_instances is None


def test_helms_flags_are_written_as_helm_has_them() -> None:
    """All but how often, and what is required: ours may be repeated, and the demo needs none."""
    from helm.benchmark.run import build_parser

    from flexgen_helm.runs.flags import run_parser

    def told(parser: argparse.ArgumentParser) -> dict[str, tuple[Any, ...]]:
        return {
            flag: (action.dest, action.option_strings, type(action), action.nargs, action.type, action.const)
            for action in parser._actions
            for flag in action.option_strings
        }

    helm, ours = told(build_parser()), told(run_parser())
    plain = ("-r", "--run-entries", "-c", "--conf-paths", "-h", "--help")
    alike = {flag: what for flag, what in helm.items() if flag not in plain}
    same = {flag: (str if kind is None else kind) for flag, (*_, kind, _) in ours.items()}
    for flag, (dest, names, action, nargs, kind, const) in alike.items():
        assert ours[flag][:4] == (dest, names, action, nargs), flag
        assert (same[flag], ours[flag][5]) == (str if kind is None else kind, const), flag
    assert set(plain) <= set(ours)


def test_entries_may_be_given_any_number_of_times(tmp_path: Path) -> None:
    conf = tmp_path / "mine.conf"
    conf.write_text('entries: [{description: "boolq:model=text", priority: 2, groups: ["g"]}]')
    args = parse(
        f"-r a:x=1 b -c {conf} -r c --description d:model=text,k=2 e:model=together/opt-66b "
        f"--description f --conf-paths {conf} --model m/m"
    )
    entries = read_entries(args)
    assert [entry.description for entry in entries] == [
        *["boolq:model=text"] * 2,
        *["a:x=1", "b", "c"],
        *["d:k=2", "e", "f"],  # FlexGen ran --model, whatever a description said
    ]
    assert (entries[0].priority, entries[0].groups) == (2, ["g"])


@pytest.mark.parametrize(
    "group",
    [
        "all",
        "text_code",
        "text",
        "code",
        "instruction_following",
        "full_functionality_text",
        "limited_functionality_text",
    ],
)
def test_a_model_group_means_the_model_of_the_command_line(group: str) -> None:
    assert assigned(f"mmlu:model={group},subject=anatomy") == assigned("mmlu:subject=anatomy")
    assert assigned("mmlu:subject=anatomy") == ["mmlu:model=org/m,model_deployment=flexgen/m,subject=anatomy"]


def test_an_entry_that_names_its_model_keeps_it() -> None:
    expected = ["boolq:model=org/m,model_deployment=flexgen/m"]
    assert assigned("boolq:model=org/m", models=[]) == expected
    assert assigned("boolq:model=org/m") == expected
    assert assigned("boolq:model=org/m,model_deployment=mine/m") == ["boolq:model=org/m,model_deployment=mine/m"]
    assert assigned("boolq:model=other/x", skip_others=True) == []


@pytest.mark.parametrize(
    ("entry", "models"), [("boolq", []), ("boolq:model=other/x", ["org/m"]), ("boolq:x", ["org/m"])]
)
def test_an_entry_without_a_usable_model(entry: str, models: list[str]) -> None:
    with pytest.raises(ConfigError, match="boolq"):
        assigned(entry, models=models)


def assigned(entry: str, models: list[str] | None = None, skip_others: bool = False) -> list[str]:
    def target(model: str) -> Target:
        return Target(model=model, model_deployment=f"flexgen/{model.split('/')[1]}")

    from helm.benchmark.presentation.run_entry import RunEntry

    models = ["org/m"] if models is None else models
    entries = assign_models([RunEntry(entry)], models, target, skip_others=skip_others)
    return [entry.description for entry in entries]


def test_a_conf_file_of_that_name_comes_before_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = conf_path("quick")
    assert shipped.name == "quick.conf"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick").write_text("entries: []")
    assert conf_path("quick") == Path("quick")


@pytest.mark.parametrize("content", ["entries: [", "entries: [{priority: 1}]", "nothing: 1", "\x00"])
def test_a_file_that_holds_no_entries(tmp_path: Path, content: str) -> None:
    conf = tmp_path / "bad.conf"
    conf.write_text(content)
    with pytest.raises(ConfigError, match=r"bad\.conf") as caught:
        read_entries(parse(f"-c {conf}"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["quick", "demo", pytest.param("mmlu", marks=pytest.mark.slow)])
def test_every_shipped_entry_builds_its_run_spec(name: str) -> None:
    from helm.benchmark.config_registry import register_builtin_configs_from_helm_package

    from flexgen_helm.runs.entries import build_run_specs

    register_builtin_configs_from_helm_package()
    entries = read_entries(parse(f"-c {name}"))
    known = Target(model="openai/gpt2", model_deployment="huggingface/gpt2")
    run_specs = build_run_specs(assign_models(entries, ["x/x"], lambda _: known, skip_others=False), parse("-m 3"))
    assert len(run_specs) == len(entries) == {"quick": 7, "demo": 3, "mmlu": 57}[name]
    assert {spec.adapter_spec.max_eval_instances for spec in run_specs} == {3}
    assert len({spec.name for spec in run_specs}) == len(run_specs)


@pytest.fixture
def built(register_helms_configs: Callable[[], None]) -> Callable[..., list[str]]:
    """Names of the run specs of entries as a command line would build them."""
    from flexgen_helm.runs.entries import build_run_specs

    register_helms_configs()
    known = Target(model="openai/gpt2", model_deployment="huggingface/gpt2")

    def built(*descriptions: str) -> list[str]:
        entries = read_entries(parse(f"-r {' '.join(descriptions)}"))
        assigned = assign_models(entries, ["x/x"], lambda _: known, skip_others=False)
        return [run_spec.name for run_spec in build_run_specs(assigned, parse("-m 3"))]

    return built


def test_different_runs_of_one_name_are_refused(built: Callable[..., list[str]]) -> None:
    name = "mmlu:subject=anatomy,method=multiple_choice_joint,model=openai_gpt2,model_deployment=huggingface_gpt2"
    first, second = "mmlu:subject=anatomy", "mmlu:subject=anatomy,temperature=0.7"
    assert built(first) == built(second) == [name]  # HELM's own naming; else there is nothing to refuse
    with pytest.raises(ConfigError) as caught:
        built(first, "boolq", second)
    for part in (",subject=anatomy'", ",subject=anatomy,temperature=0.7'", repr(name), "--suite"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_entry_given_twice_is_no_other_run(built: Callable[..., list[str]]) -> None:
    assert len(set(built("mmlu:subject=anatomy", "boolq", "mmlu:subject=anatomy"))) == 2
    assert len(set(built("mmlu:subject=anatomy", "mmlu:subject=anatomy,num_outputs=2"))) == 2  # HELM names it


@pytest.mark.parametrize("name", ["opt-30b-t4", "opt-175b-t4", "all-on-gpu", "all-on-cpu"])
def test_every_shipped_policy_loads(name: str) -> None:
    assert Policy.load(name).weights is not None


def test_no_policy_is_shipped_untested() -> None:
    from engine.policy import policy_directories

    shipped = {file.stem for folder in policy_directories() for file in folder.glob("*.yaml")}
    helm_30b = {f"helm-30b-{kind}" for kind in ("mmlu", "synthetic", "wikifact", "xsum")}  # test_run_specs loads them
    assert shipped == {"opt-30b-t4", "opt-175b-t4", "all-on-gpu", "all-on-cpu"} | helm_30b
