"""Protects: `flexgen-helm reproduce` runs a run again from its record alone, and says what came out again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from question_data import MMLU_SUBJECTS
from scenario_files import table
from tiny_models import random_llama, save_tiny_model
from transformers import AutoModelForCausalLM

from engine.checkpoint.identity.result import result_identity
from engine.policy import Policy
from flexgen_helm.helm.records.provenance import FILE_NAME
from flexgen_helm.helm.request_cache import RequestCache
from flexgen_helm.run import main

Cli = Callable[..., int]
ENTRY = f"mmlu:subject={MMLU_SUBJECTS[0]}"
SAMPLED = "simple_mcqa:temperature=0.7"


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, helm_data: Path) -> Iterator[Cli]:
    """Run a command line in a directory that has a copy of HELM's data."""
    folder = tmp_path / "here"
    shutil.copytree(helm_data / "scenarios" / "mmlu", folder / "benchmark_output/scenarios/mmlu")
    monkeypatch.chdir(folder)
    handler = logging.NullHandler()
    logging.getLogger("helm").addHandler(handler)
    yield lambda *arguments: main([str(argument) for argument in arguments])
    logging.getLogger("helm").removeHandler(handler)


def run_dirs(suite: str) -> list[Path]:
    return sorted(file.parent for file in Path("benchmark_output/runs", suite).glob("*/run_spec.json"))


def state_of(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of writing of all files below."""
    return {
        str(file): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flexgen-helm: error: ")]
    return line


def seal(folder: Path, **changes: Any) -> None:
    """Let a record belong to the files that are there now, with other changes."""
    record = json.loads((folder / FILE_NAME).read_text())
    record["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in record["files"]}
    (folder / FILE_NAME).write_text(json.dumps({**record, **changes}))


def test_runs_of_a_sweep_and_of_a_run_come_out_again_without_the_cache(
    cli: Cli, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedy and sampled ones. What HELM's cache holds is spoilt meanwhile, and its models are unknown elsewhere."""
    from helm.common.cache import SqliteCacheConfig

    common = ("-r", ENTRY, SAMPLED, "--model", tiny_llama, "-m", 4)
    assert cli("sweep", *common, "--suite", "swept") == 0
    assert cli("run", *common, "--suite", "run", "--disable-cache") == 0
    with RequestCache(SqliteCacheConfig("prod_env/cache/flexgen.sqlite")) as cache:
        rows = cache._sql.execute("SELECT count(*) FROM unnamed").fetchone()
        cache._sql.execute("UPDATE unnamed SET value = x'00'")
    assert rows[0] > 4
    folders = [*run_dirs("swept"), *run_dirs("run")]
    assert len(folders) == 4
    before = state_of(Path())
    for folder in folders:
        capsys.readouterr()
        assert cli("reproduce", folder) == 0
        out = capsys.readouterr().out
        assert out.splitlines()[-1] == "equal"
        assert folder.name in out.splitlines()
        assert "same versions, on the same kind of machine" in out
    assert state_of(Path()) == before


def test_every_record_says_what_it_was_made_with(cli: Cli, tiny_llama: Path) -> None:
    from importlib.metadata import version

    common = ("-r", ENTRY, "--model", tiny_llama, "-m", 2, "--gpu-batch-size", 3)
    assert cli("sweep", *common, "--suite", "swept") == 0
    assert cli("verify", *common, "--suite", "verified") == 0
    suite = json.loads(Path("benchmark_output/runs/swept/flexgen_sweep.json").read_text())
    (swept,), (verified,) = run_dirs("swept"), run_dirs("verified")
    run, fidelity = json.loads((swept / FILE_NAME).read_text()), json.loads((verified / "fidelity.json").read_text())
    for record in (suite, run, fidelity):
        for name in ("torch", "transformers", "crfm-helm"):
            assert record["versions"][name] == version(name)
        assert record["versions"]["python"].startswith("3.")
        assert record["hardware"]["cores"] >= 1
        assert "commit" in record
    for record in (suite["models"][0], run, fidelity):
        assert record["policy"] == {"gpu-batch-size": 3}
        assert len(record["identity"]["weights"]) == 64
        assert record["identity"]["dtype"] == "float32"
        assert "sha256" in record["seeds"]


def test_other_data_are_other_requests(cli: Cli, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("sweep", "-r", ENTRY, "--model", tiny_llama, "-m", 4, "--suite", "s") == 0
    (folder,) = run_dirs("s")
    rows = [[f"{n} minus {n}?", 0, 1, 2, 3, "A"] for n in range(4)]
    table(Path("benchmark_output/scenarios/mmlu/data/test") / f"{MMLU_SUBJECTS[0]}_test.csv", rows)
    before = state_of(folder)
    capsys.readouterr()
    assert cli("reproduce", folder, "--json", "again.json") == 1
    out = capsys.readouterr().out
    told = json.loads(Path("again.json").read_text())
    assert out.splitlines()[-1].startswith(f"DIFFERENT: {told['requests']['total']} of {told['requests']['total']} ")
    assert "differs: request 1 (instance id" in out
    assert told["equal"] is False
    assert told["requests"]["equal"] == 0
    assert state_of(folder) == before


def test_one_other_answer_is_named(cli: Cli, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("sweep", "-r", ENTRY, "--model", tiny_llama, "-m", 4, "--suite", "s") == 0
    (folder,) = run_dirs("s")
    state = json.loads((folder / "scenario_state.json").read_text())
    state["request_states"][2]["result"]["completions"][0]["text"] = "forty two"
    nudged = state["request_states"][1]["result"]["completions"][0]["tokens"][0]
    nudged["logprob"] += 0.01
    (folder / "scenario_state.json").write_text(json.dumps(state))
    assert cli("reproduce", folder) == 2
    assert "scenario_state.json has changed since flexgen_run.json was written" in error_of(capsys)
    seal(folder)
    assert cli("reproduce", folder) == 1
    out = capsys.readouterr().out
    assert f"answers {len(state['request_states']) - 1} of {len(state['request_states'])} equal" in " ".join(
        out.split()
    )
    assert f"differs: instance {state['request_states'][2]['instance']['id']}: texts 'forty two' and " in out
    assert "they differ by 0.01 at most (rounding explains 0.0001)" in out
    assert "1 of " in out.splitlines()[-1]
    assert "log-probabilities by up to 0.01" in out.splitlines()[-1]


def test_a_checkpoint_that_has_changed_is_refused_with_both_identities(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_model(tmp_path / "tiny-that-changes", random_llama)
    assert cli("sweep", "-r", ENTRY, "--model", model, "-m", 2, "--suite", "s") == 0
    (folder,) = run_dirs("s")
    then = json.loads((folder / FILE_NAME).read_text())["identity"]["weights"]
    kept = shutil.copytree(model, tmp_path / "kept")
    changed = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for weight in changed.parameters():
            weight += 0.5
    changed.save_pretrained(model)
    before = state_of(Path())
    assert cli("reproduce", folder) == 2
    now = result_identity(str(model), Policy())["weights"]
    told = f"has changed since the run was made: other weights (sha256 {then[:12]} then, {str(now)[:12]} now)"
    assert told in error_of(capsys)
    assert state_of(Path()) == before
    shutil.copytree(kept, model, dirs_exist_ok=True)
    (model / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert cli("reproduce", folder) == 2
    assert "other configuration, tokenizer or chat template files (sha256 " in error_of(capsys)
    shutil.rmtree(model)
    assert cli("reproduce", folder) == 2
    assert "tiny-that-changes" in error_of(capsys)


def test_other_software_is_tried_and_told_and_nothing_but_it_explains_other_bits(
    cli: Cli, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under a batch-invariant policy rounding explains nothing, unless another program computes."""
    Path("policy.yaml").write_text("batch-invariant: true\n")
    assert cli("sweep", "-r", ENTRY, "--model", tiny_llama, "--policy", "policy.yaml", "-m", 2, "--suite", "s") == 0
    (folder,) = run_dirs("s")
    identity = json.loads((folder / FILE_NAME).read_text())["identity"]
    assert identity["batch_invariant"] == 1
    for changes, tolerance in (({}, 0.0), ({"source": "0" * 64, "numerics": 1}, 1e-4)):
        seal(folder, identity={**identity, **changes})
        capsys.readouterr()
        assert cli("reproduce", folder, "--json", "again.json") == 0
        (since,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("since then: ")]
        told = json.loads(Path("again.json").read_text())
        assert told["tolerance"] == tolerance
        assert told["now"]["identity"] == identity
        assert told["then"]["identity"] == {**identity, **changes}
        if changes:
            digests = f"sha256 {'0' * 12} then, {identity['source'][:12]} now"
            source = f"transformers' source of the family ({digests})"
            assert since == f"since then: {source} and numerics (1 then, {identity['numerics']} now)"
        else:
            assert since.startswith("since then: the same versions")


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda run: run.parent / "none", "there is no directory"),
    "a suite": (lambda run: run.parent, "is a suite of 1 runs; name one of them, such as "),
    "no run": (lambda run: Path("prod_env"), "is no run of HELM: it has no run_spec.json"),
    "no record": (lambda run: _without(run, FILE_NAME), "has no flexgen_run.json: plain helm-run or an earlier"),
    "another version": (lambda run: _with(run, version=2), "has version 2, this flexgen-helm reads 1; run it again"),
    "half a record": (lambda run: _written(run, '{"version": 1'), "is not JSON"),
    "an odd record": (lambda run: _with(run, seeds=3), "is no record of a run: seeds is '3' where a text is expected"),
    "no checkpoint": (lambda run: _with(run, identity={"dtype": "float32"}), "does not say which checkpoint answered"),
    "a pipe": (lambda run: _piped(run), "stats.json is a pipe; a regular file is expected there"),
    "another client": (lambda run: _client(run, "os.system"), "the record names the client os.system"),
    "another's code": (lambda run: _scenario(run, "subprocess.Popen"), "'subprocess.Popen' is named where a Scenario"),
    "a function": (lambda run: _scenario(run, "helm.common.general.shell"), "is named where a Scenario is expected"),
    "a module": (lambda run: _scenario(run, "nobodys.Scenario"), "which is neither HELM's nor an installed plugin's"),
    "a tokenizer": (lambda run: _tokenizer(run, "os.system"), "'os.system' is named where a Tokenizer is expected"),
    "a window": (lambda run: _window(run, "os.system"), "'os.system' is named where a WindowService is expected"),
    "a torn run": (lambda run: _torn(run), "is no finished run: per_instance_stats.json cannot be read"),
}


def _without(run: Path, name: str) -> Path:
    (run / name).unlink()
    return run


def _with(run: Path, **changes: Any) -> Path:
    seal(run, **changes)
    return run


def _written(run: Path, text: str) -> Path:
    (run / FILE_NAME).write_text(text)
    return run


def _client(run: Path, name: str) -> Path:
    record = json.loads((run / FILE_NAME).read_text())
    record["entries"]["deployment"]["client_spec"]["class_name"] = name
    return _with(run, entries=record["entries"])


def _scenario(run: Path, name: str) -> Path:
    spec = json.loads((run / "run_spec.json").read_text())
    spec["scenario_spec"] = {"class_name": name, "args": {"args": ["touch", "it-ran"]}}
    (run / "run_spec.json").write_text(json.dumps(spec))
    return _with(run)


def _tokenizer(run: Path, name: str) -> Path:
    entries = json.loads((run / FILE_NAME).read_text())["entries"]
    entries["tokenizer"]["tokenizer_spec"]["class_name"] = name
    return _with(run, entries=entries)


def _window(run: Path, name: str) -> Path:
    entries = json.loads((run / FILE_NAME).read_text())["entries"]
    entries["deployment"]["window_service_spec"] = {"class_name": name, "args": {"command": "touch it-ran"}}
    return _with(run, entries=entries)


def _piped(run: Path) -> Path:
    (run / "stats.json").unlink()
    os.mkfifo(run / "stats.json")
    return run


def _torn(run: Path) -> Path:
    (run / "per_instance_stats.json").write_text("[{")
    return run


def test_bad_input(cli: Cli, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("run", "-r", ENTRY, "--model", tiny_llama, "-m", 1, "--suite", "whole") == 0
    (whole,) = run_dirs("whole")
    for number, (name, (spoil, told)) in enumerate(BAD.items()):
        run = Path("benchmark_output/runs", f"bad{number}", whole.name)
        shutil.copytree(whole, run)
        path = spoil(run)
        before = state_of(Path())
        capsys.readouterr()
        assert cli("reproduce", path) == 2, name
        assert told in error_of(capsys), name
        assert state_of(Path()) == before, name
    assert cli("reproduce", whole, "--json", "no/such/file") == 2
    assert "--json no/such/file cannot be written" in error_of(capsys)
