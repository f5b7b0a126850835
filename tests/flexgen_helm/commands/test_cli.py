"""Protects: the command line runs HELM on the engine end to end, and refuses bad input in one line, leaving nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_engine import FakeEngine
from tiny_models import random_llama, save_tiny_model

from engine.errors import CapacityError, CheckpointError
from flexgen_helm.helm.completed import lack_of
from flexgen_helm.run import main

ENTRY = "synthetic_reasoning_natural:difficulty=easy"
ROOT = Path(__file__).resolve().parents[3]

Cli = Callable[..., int]


def refused(capsys: pytest.CaptureFixture[str], code: int, *, expected: int = 2) -> str:
    """Check that a command line was refused in one line, and return that line."""
    errors = capsys.readouterr().err.splitlines()
    assert code == expected, errors
    assert len(errors) == 1
    assert errors[0].startswith("flexgen-helm: error: ")
    return errors[0]


def stats_of(runs: Path) -> dict[str, dict[str, float]]:
    found = {}
    for file in runs.glob("*/stats.json"):
        stats = json.loads(file.read_text())
        found[file.parent.name] = {
            json.dumps(stat["name"], sort_keys=True): stat["sum"]
            for stat in stats
            if not any(part in stat["name"]["name"] for part in ("runtime", "batch_size"))
        }
    return found


# Runs


def llama_of_64_numbers(tokenizer: Any) -> Any:
    """`random_llama` with keys and values of 64 numbers a token and layer, a whole group of codes."""
    from transformers import LlamaForCausalLM

    config = random_llama(tokenizer).config
    config.hidden_size, config.head_dim = 64, 16
    return LlamaForCausalLM(config)


@pytest.mark.usefixtures("warm_processes")
def test_a_run_ends_with_its_scores_and_helm_knows_the_model(
    cli: Cli, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{ENTRY},model=local_tiny-llama,model_deployment=flexgen_tiny-llama"
    assert cli("run", "-r", ENTRY, "--model", tiny_llama, "-m", 3) == 0
    out = capsys.readouterr().out.splitlines()
    assert any(line.startswith("local/tiny-llama ") and line.endswith("score") for line in out)
    assert [line.split()[0] for line in out if " test " in line] == [ENTRY]
    assert any("3 requests, " in line and " tokens/s" in line for line in out)
    first = stats_of(Path("benchmark_output/runs/default"))
    assert set(first) == {name}
    deployments = yaml.safe_load(Path("prod_env/model_deployments.yaml").read_text())["model_deployments"]
    assert [each["name"] for each in deployments] == ["flexgen/tiny-llama"]

    # Another policy: answered from HELM's cache, and the same.
    assert cli("run", "--description", f"{ENTRY.replace(':', ':model=text,')}", "--model", tiny_llama, "-m", 3,
               "--percent", 0, 100, 0, 100, 0, 100, "--suite", "other") == 0  # fmt: skip
    assert "3 requests, all answered from the cache" in capsys.readouterr().out
    assert stats_of(Path("benchmark_output/runs/other")) == first

    # Without the cache: computed under that policy, and the same.
    assert cli("run", "-r", ENTRY, "--model", tiny_llama, "-m", 3, "--percent", 0, 100, 0, 100, 0, 100,
               "--suite", "third", "--disable-cache") == 0  # fmt: skip
    assert stats_of(Path("benchmark_output/runs/third")) == first

    summarize = [sys.executable, "-m", "helm.benchmark.presentation.summarize", "--suite", "default"]
    made = subprocess.run(summarize, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert "tiny-llama" in Path("benchmark_output/runs/default/runs.json").read_text()


def test_a_registered_model_is_found_by_its_helm_name_with_its_own_settings(
    cli: Cli, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path.cwd() / "mine.yaml").write_text("gpu-batch-size: 2\n")
    assert cli("register", tiny_llama, "--name", "acme/rocket", "--policy", "mine.yaml", "--local-path", "env") == 0
    assert "model=acme/rocket,model_deployment=flexgen/rocket" in capsys.readouterr().out
    before = Path("env/model_deployments.yaml").read_text()
    assert yaml.safe_load(before)["model_deployments"][0]["client_spec"]["args"]["policy"] == str(
        Path("mine.yaml").absolute()
    )
    entry = f"{ENTRY},model=acme/rocket,model_deployment=flexgen/rocket"
    assert cli("run", "-r", entry, "-m", 1, "--local-path", "env") == 0
    assert Path("env/model_deployments.yaml").read_text() == before


def test_answers_of_compressed_weights_and_caches_are_others(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are computed, and kept apart in HELM's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = save_tiny_model(tmp_path / "tiny-square", llama_of_64_numbers)
    run = ("run", "-r", ENTRY, "--model", model, "-m", 3)
    for codes in ((), ("--compress-weight", 8), ("--compress-cache", 8), ("--compress-weight", "--compress-cache", 4)):
        for told in ("3 requests, ", "3 requests, all answered from the cache"):
            assert cli(*run, *codes) == 0
            out = capsys.readouterr().out
            assert told in out
            assert ("from the cache" in out) == ("from the cache" in told)


def test_scores_of_an_earlier_command_are_not_shown(
    cli: Cli, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("run", "-r", ENTRY, "--model", tiny_llama, "-m", 2)
    assert cli(*run) == 0
    capsys.readouterr()
    assert cli(*run, "--pad-to-seq-len", 9) == 2
    assert ENTRY not in capsys.readouterr().out
    assert cli(*run, "--skip-completed-runs") == 0
    assert ENTRY in capsys.readouterr().out


def test_a_run_whose_every_request_failed_is_a_failed_run(
    cli: Cli, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    broken = shutil.copytree(tiny_llama, tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    model.save_pretrained(broken)
    assert cli("run", "-r", ENTRY, "--model", broken, "-m", 3) == 1
    told = capsys.readouterr()
    assert ENTRY not in told.out
    assert "all 3 requests failed; the first: NumericsError" in told.err


def test_requests_that_fail_are_told_beside_the_scores_and_fail_the_command(
    cli: Cli, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A token of one of the prompts has no finite embedding."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert cli("run", "-r", ENTRY, "--model", tiny_llama, "-m", 3) == 0
    (state,) = Path("benchmark_output/runs").glob("**/scenario_state.json")
    prompts = [each["request"]["prompt"] for each in json.loads(state.read_text())["request_states"]]
    ids = [set(AutoTokenizer.from_pretrained(tiny_llama)(prompt)["input_ids"]) for prompt in prompts]
    alone = next(iter(ids[0] - ids[1] - ids[2]))
    broken = shutil.copytree(tiny_llama, tmp_path / "partly-broken")
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.get_input_embeddings().weight[alone] = float("nan")
    model.save_pretrained(broken)
    capsys.readouterr()
    assert cli("run", "-r", ENTRY, "--model", broken, "-m", 3, "--disable-cache") == 1
    told = capsys.readouterr()
    line = "1 requests failed and count as empty answers; the first: NumericsError"
    assert f"{ENTRY}: {line}" in told.out
    assert line in told.err


def test_a_chat_template_has_room_beside_what_helm_makes(
    cli: Cli, tiny_chat: Path, helm_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Language modelling fills the window, whatever it is."""
    shutil.copytree(helm_data / "scenarios", Path("benchmark_output/scenarios"))
    assert cli("run", "-r", "twitter_aae:demographic=aa", "--model", tiny_chat, "-m", 1) == 0
    deployments = yaml.safe_load(Path("prod_env/model_deployments.yaml").read_text())["model_deployments"]
    assert 450 < deployments[0]["max_sequence_length"] < 500


def test_a_model_without_a_window_is_told_one(
    cli: Cli, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endless = shutil.copytree(tiny_llama, tmp_path / "endless")
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        content = json.loads((endless / name).read_text())
        content.pop(key)
        (endless / name).write_text(json.dumps(content))
    run = ("run", "-r", ENTRY, "--model", endless, "-m", 1)
    assert "give --max-sequence-length N" in refused(capsys, cli(*run))
    assert cli(*run, "--max-sequence-length", 300) == 0
    (deployment,) = yaml.safe_load(Path("prod_env/model_deployments.yaml").read_text())["model_deployments"]
    assert deployment["max_sequence_length"] == deployment["client_spec"]["args"]["window"] == 300
    capsys.readouterr()
    assert cli("register", endless, "--local-path", "env", "--max-sequence-length", 50) == 0
    (deployment,) = yaml.safe_load(Path("env/model_deployments.yaml").read_text())["model_deployments"]
    assert deployment["client_spec"]["args"]["window"] == 50
    # Registered, and told another for one run: HELM's prompts are longer then.
    known = ("run", "-r", f"{ENTRY},model=local/endless", "-m", 1, "--local-path", "env")
    assert cli(*known, "--model", "local/endless", "--max-sequence-length", 400, "--suite", "long") == 0
    capsys.readouterr()
    assert "below 1" in refused(capsys, cli(*known, "--model", "local/endless", "--max-sequence-length", 0))


def test_a_longest_sequence_leaves_room_for_the_chat_template(
    cli: Cli, tiny_chat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("register", tiny_chat, "--local-path", "env") == 0
    (deployment,) = yaml.safe_load(Path("env/model_deployments.yaml").read_text())["model_deployments"]
    room = deployment["max_sequence_length"]
    capsys.readouterr()
    for asked, window in ((room, None), (room + 1, 513)):  # rotary positions go on beyond the window of the files
        env = f"other-{asked}"
        assert cli("register", tiny_chat, "--local-path", env, "--max-sequence-length", asked) == 0
        (deployment,) = yaml.safe_load(Path(env, "model_deployments.yaml").read_text())["model_deployments"]
        assert deployment["client_spec"]["args"].get("window") == window


def test_a_failed_run_is_exit_code_1_and_keeps_what_went_well(
    cli: Cli, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = (ENTRY, "custom_mcqa:path=nowhere.jsonl,num_train_instances=0")
    code = cli("run", "-r", *entries, "--model", tiny_llama, "-m", 1)
    captured = capsys.readouterr()
    assert code == 1
    assert captured.err.splitlines()[-1].startswith("flexgen-helm: error: Failed runs: [")
    assert "Traceback" not in captured.err
    assert len(stats_of(Path("benchmark_output/runs/default"))) == 1


# Bad input

BAD: dict[str, tuple[list[str], str]] = {
    "unknown entry": (["-r", "synthetic_raesoning:mode=induction"], "did you mean synthetic_reasoning"),
    "wrong entry argument": (["-r", "synthetic_reasoning:mode=sideways"], "sideways"),
    "missing entry argument": (["-r", "synthetic_reasoning"], "mode"),
    "entry that is none": (["-r", "synthetic_reasoning:induction"], "name:key=value"),
    "no file of entries": (["-c", "nowhere.conf"], "nowhere.conf"),
    "unknown policy": (["-r", ENTRY, "--policy", "opt-30b-t5"], "did you mean 'opt-30b-t4'"),
    "six percents": (["-r", ENTRY, "--percent", "100", "0"], "six numbers"),
    "disk without a directory": (["-r", ENTRY, "--percent", "0", "0", "0", "100", "0", "100"], "offload-dir"),
    "unknown flag": (["-r", ENTRY, "--pad-to-length", "3"], "--pad-to-length"),
    "unknown group": (["-r", ENTRY, "--groups-to-run", "nothing"], "--groups-to-run"),
    "unknown plugin": (["-r", ENTRY, "--plugins", "no_such_plugin"], "no_such_plugin"),
    "prompt longer than the pad": (["-r", ENTRY, "-m", "2", "--pad-to-seq-len", "9"], "9"),
    "compression": (["-r", ENTRY, "-m", "1", "--compress-weight", "3"], "--compress-weight"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input(case: str, cli: Cli, tiny_llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments, message = BAD[case]
    code = cli("run", *arguments, "--model", tiny_llama)
    assert message in refused(capfd, code)
    assert not list(Path.cwd().iterdir())


def test_bad_input_in_the_last_run_is_found_before_the_first_begins(
    cli: Cli, tiny_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A prompt without examples fits into the pad, one with five does not."""
    short, long = "simple_mcqa:max_train_instances=0", ENTRY
    assert cli("run", "-r", short, "--model", tiny_llama, "-m", 1, "--pad-to-seq-len", 200) == 0
    capfd.readouterr()
    code = cli("run", "-r", short, long, "--model", tiny_llama, "-m", 1, "--pad-to-seq-len", 200, "--suite", "second")
    assert ENTRY in refused(capfd, code)
    assert not Path("benchmark_output/runs/second").exists()


def test_a_metric_whose_package_is_missing_is_found_before_the_first_run_begins(
    cli: Cli, tiny_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    entries = (ENTRY, "summarization_xsum_sampled:temperature=0.3,device=cpu")
    code = cli("run", "-r", *entries, "--model", tiny_llama, "-m", 1)
    assert "pip install" in refused(capfd, code)
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(("model", "message"), [("nowhere/at/all", "does not exist"), ("empty", "config.json")])
@pytest.mark.parametrize("command", ["run", "register"])
def test_bad_model(command: str, model: str, message: str, cli: Cli, capfd: pytest.CaptureFixture[str]) -> None:
    folder = Path.cwd() / "empty"
    folder.mkdir()
    code = cli("register", model) if command == "register" else cli("run", "-r", ENTRY, "--model", model)
    assert message in refused(capfd, code)
    assert list(Path.cwd().iterdir()) == [folder]


def test_no_model(cli: Cli, capfd: pytest.CaptureFixture[str]) -> None:
    assert "--model" in refused(capfd, cli("run", "-r", ENTRY))
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("flag", ["-o", "--local-path"])
def test_directories_that_cannot_be_written(
    flag: str, cli: Cli, tiny_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("taken").write_text("a file")
    code = cli("run", "-r", ENTRY, "--model", tiny_llama, flag, "taken/below")
    assert "taken is not a directory" in refused(capfd, code)
    assert [path.name for path in Path.cwd().iterdir()] == ["taken"]


def test_a_refused_run_leaves_an_older_output_as_it_was(
    cli: Cli, tiny_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli("run", "-r", ENTRY, "--model", tiny_llama, "-m", 1) == 0
    capfd.readouterr()
    before = sorted(path for path in Path("benchmark_output").rglob("*"))
    other = "synthetic_reasoning_natural:difficulty=hard"
    code = cli("run", "-r", other, "--model", tiny_llama, "-m", 1, "--pad-to-seq-len", 9)
    refused(capfd, code)
    assert sorted(path for path in Path("benchmark_output").rglob("*")) == before


@pytest.mark.parametrize("more", [[], ["--exit-on-error"]])
def test_a_disk_that_fills_up_while_a_run_computes_costs_no_answer(
    more: list[str], cli: Cli, tiny_llama: Path, fake_engines: list[FakeEngine],
    failing_engines: Callable[..., AbstractContextManager[None]], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = ("run", "-r", ENTRY, "--model", tiny_llama, "-m", 3, *more)
    with failing_engines(CapacityError("offload-dir: no room"), 2):
        assert cli(*command) == 1
    assert "no room" in capsys.readouterr().err
    assert cli(*command) == 0
    assert [len(jobs) for engine in fake_engines for jobs in engine.calls] == [3, 1]


@pytest.mark.parametrize("moment", ["before it is refused", "before it writes", "while it runs"])
def test_a_refused_run_leaves_alone_what_another_command_made_meanwhile(
    moment: str, cli: Cli, tiny_llama: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both begin where nothing is."""
    from flexgen_helm.runs import launch

    step = "run_benchmarking" if moment == "while it runs" else "prepare"
    do, others = getattr(launch, step), Path("benchmark_output/runs/other/run/stats.json")

    def meanwhile(*args: Any, **kwargs: Any) -> Any:
        try:
            return do(*args, **kwargs)
        finally:
            others.parent.mkdir(parents=True)
            others.write_text("[]")
            Path("prod_env/cache").mkdir(parents=True, exist_ok=True)
            Path("prod_env/cache/others.sqlite").write_text("")

    monkeypatch.setattr(launch, step, meanwhile)
    entry = "no_such_scenario" if moment == "before it is refused" else ENTRY
    code = cli("run", "-r", entry, "--model", tiny_llama, "-m", 1, "--pad-to-seq-len", 9, "--suite", "mine")
    refused(capfd, code)
    assert others.exists()
    assert Path("prod_env/cache/others.sqlite").exists()
    assert not [path for path in Path("benchmark_output/runs/mine").glob("*") if path.name != "eval_cache"]


def refuse_to_load(*_: Any) -> Any:
    """What is opened may still be refused when its weights are read."""
    raise CheckpointError("weights and config.json do not belong together")


def test_a_run_that_is_refused_when_it_loads_leaves_nothing(
    cli: Cli, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flexgen_helm.helm.engines import engines

    engines.close()  # one that is loaded would answer
    monkeypatch.setattr(engines, "load", refuse_to_load)
    assert cli("run", "-r", ENTRY, "--model", tiny_llama, "-m", 1) == 2
    engines.close()  # what failed once fails again
    note, error = capsys.readouterr().err.splitlines()
    assert "no chat template" in note
    assert error.startswith("flexgen-helm: error: ")
    assert "do not belong together" in error
    assert not list(Path.cwd().iterdir())


def test_a_run_that_is_refused_late_takes_back_its_own_files_only(
    cli: Cli, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others' answers, keys, entries and notes, made beside its own after it began, are as they were."""
    from flexgen_helm.helm.engines import engines

    theirs = dict[str, bytes]()
    engines.close()

    def meanwhile(path: str, policy: Any, window: int | None) -> Any:
        with closing(sqlite3.connect("prod_env/cache/other.sqlite")) as cache:
            cache.execute("CREATE TABLE unnamed (key TEXT, value BLOB)")
        Path("prod_env/credentials.conf").write_text("key: 1")
        with Path("prod_env/model_metadata.yaml").open("a") as file:
            file.write("# of another\n")
        Path("benchmark_output/notes.txt").write_text("notes")
        for name in ("prod_env/cache/other.sqlite", "prod_env/credentials.conf", "prod_env/model_metadata.yaml",
                     "benchmark_output/notes.txt"):  # fmt: skip
            theirs[name] = Path(name).read_bytes()
        return refuse_to_load()

    monkeypatch.setattr(engines, "load", meanwhile)
    assert cli("run", "-r", ENTRY, "--model", tiny_llama, "-m", 1) == 2
    engines.close()
    assert len(theirs) == 4
    assert {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()} == theirs


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_a_run_all_of_whose_requests_failed_is_a_failed_run(
    command: str, cli: Cli, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every weight is NaN: as scores, so many empty answers would mean nothing."""
    import torch
    from safetensors.torch import load_file, save_file

    model = tmp_path / f"nan-{command}"
    shutil.copytree(tiny_llama, model)
    (weights,) = model.glob("*.safetensors")
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(weights).items()}
    save_file(broken, weights, metadata={"format": "pt"})
    assert cli(command, "-r", ENTRY, "--model", model, "-m", 2, "--suite", "broken") == 1
    assert "all 2 requests failed; the first: " in "".join(capsys.readouterr())  # a sweep tells of runs in its summary
    assert not list(Path("benchmark_output/runs/broken").glob("*/stats.json"))


def test_two_models_of_one_name_are_not_mixed_up(
    cli: Cli, tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli("run", "-r", ENTRY, "--model", tiny_llama, "-m", 1) == 0
    link, twin = tmp_path / "link" / tiny_llama.name, tmp_path / "twin" / tiny_llama.name
    link.parent.mkdir()
    link.symlink_to(tiny_llama)
    shutil.copytree(tiny_llama, twin)
    assert cli("run", "-r", ENTRY, "--model", link, "-m", 1) == 0
    capfd.readouterr()
    assert "--local-path" in refused(capfd, cli("run", "-r", ENTRY, "--model", twin, "-m", 1))


# The installation


def run_python(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(map(str, [path or "", ROOT]))}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def broken_torchvision(tmp_path: Path) -> Path:
    """A torchvision that cannot be imported beside the torch that is installed."""
    package = tmp_path / "site" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist\\nmore")')
    return package.parent


@pytest.mark.slow
def test_a_wrong_pair_of_torch_and_torchvision_is_noticed_at_once(tmp_path: Path, broken_torchvision: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    run = run_python("-m", "flexgen_helm.run", "-r", ENTRY, "--model", "m/m", cwd=here, path=broken_torchvision)
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert "pip install" in run.stderr
    assert "torchvision::nms" in run.stderr
    assert not list(here.iterdir())
    doctor = run_python("-m", "flexgen_helm", "doctor", cwd=here, path=broken_torchvision)
    assert doctor.returncode == 1
    assert [line.split()[1] for line in doctor.stdout.splitlines() if line.startswith("broken")] == ["torchvision"]


@pytest.mark.parametrize("command", ["run", "register", "doctor"])
def test_another_package_called_engine_in_the_way(command: str, tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("")
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: not found')")  # spares doctor the import
    done = run_python("-m", "flexgen_helm", command, *(["m/m"] if command == "register" else []), cwd=tmp_path)
    text = done.stdout if command == "doctor" else done.stderr
    assert done.returncode == (1 if command == "doctor" else 2), done.stderr
    assert str(tmp_path / "engine") in text
    assert "Traceback" not in done.stderr
    ours = sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__")  # Python's, of torch.py
    assert ours == ["engine", "torch.py"]


def test_doctor_is_content_here_and_imports_no_helm(tmp_path: Path) -> None:
    program = (
        "import sys; from flexgen_helm.run import main; code = main(['doctor']);"
        "print(code, [name for name in sys.modules if name == 'helm' or name.startswith('helm.')])"
    )
    done = run_python("-c", program, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[-1] == "0 []", done.stdout
    looked_at = {line[9:26].strip() for line in lines[:-1]}
    assert {
        "python",
        "torch",
        "torchvision",
        "crfm-helm",
        "host memory",
        "SentencePiece",
        "tiktoken",
        "tekken",
        "offload-dir",
        "helm entry point",
    } <= looked_at


def test_doctor_says_when_the_offload_directory_cannot_be_written(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    assert cli("doctor", "--offload-dir", "file/below") == 1
    assert any(line.startswith("broken   offload-dir") for line in capsys.readouterr().out.splitlines())


@pytest.fixture
def quick_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Measuring takes moments; returns where profiles are kept."""
    from engine.measuring.profiler import Effort

    few = {"seconds": 0.001, "copy_bytes": 1 << 16, "width": 32, "ring_bytes": 1 << 14, "rows": (1, 4), "context": 4}
    cache = {"prefill_sequences": 1, "device_cache_bytes": 1 << 18, "host_cache_bytes": 1 << 18}
    effort = Effort(**few, **cache, disk_bytes=16 << 20, disk_seconds=0.1)  # type: ignore[arg-type]
    monkeypatch.setattr(Effort, "fitting", lambda device, dtype: effort)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "flexgen-helm"


def test_doctor_tells_of_kept_weights(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """How much, and where to delete it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = tmp_path / "cache" / "flexgen-helm" / "weights"
    for number, model in enumerate(("one", "one", "another")):
        (weights / model).mkdir(parents=True, exist_ok=True)
        with (weights / model / f"layer.{number}.safetensors").open("wb") as file:
            file.truncate(10**8)
    cli("doctor")
    (line,) = [each for each in capsys.readouterr().out.splitlines() if "encoded weights" in each]
    assert f"0.3 GB of 2 models in {weights}" in line


def test_doctor_measures_a_profile_and_finds_it_again(
    cli: Cli, quick_profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def found() -> str:
        cli("doctor")
        return next(line for line in capsys.readouterr().out.splitlines() if "hardware profile" in line)

    assert found().startswith("missing  hardware profile")
    assert cli("doctor", "--profile") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"host to device +[\d.]+ [kMGT]B/s", line) for line in lines)
    assert any(re.fullmatch(r"matrix product, 1 row +[\d.]+ [kMGT]FLOP/s", line) for line in lines)
    (file,) = quick_profile.glob("*.yaml")
    assert lines[-1] == f"kept in {file}"
    assert not list(Path().iterdir())
    assert found().startswith("ok       hardware profile")


def test_doctor_finds_out_how_much_memory_a_machine_gives_that_shows_little(
    cli: Cli, quick_profile: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that shows 32 GB of 137, and gives 135: what is found is kept, and counts from then on."""
    from engine.memory.trial import Trial
    from engine.planning import hardware_profile, host_growth
    from engine.planning import host_limits as limits
    from engine.planning.hardware import available_memory

    gb = 10**9
    shown = limits.HostLimits(machine_available=30 * gb, machine_total=32 * gb, machine_present=137 * gb)
    for module in (limits, host_growth, hardware_profile):
        monkeypatch.setattr(module, "host_limits", lambda: shown)
    monkeypatch.setattr(host_growth, "try_memory", lambda most: Trial(taken=most - 4 * gb, total=most - 2 * gb))
    cli("doctor")
    (line,) = [each for each in capsys.readouterr().out.splitlines() if "host memory" in each]
    assert "30.0 GB of 32.0 GB available; the machine has 137.0 GB: `flexgen-helm doctor --profile` tries" in line
    assert available_memory("cpu", None, None, None).host == int(0.9 * 30 * gb)
    assert cli("doctor", "--profile") == 0
    assert "host memory: 32.0 GB were shown, 135.0 GB found by taking them" in capsys.readouterr().out
    assert available_memory("cpu", None, None, None).host == int(0.9 * (135 - 2) * gb)


def test_doctor_cannot_measure_or_keep_a_profile(
    cli: Cli, quick_profile: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("")
    said = refused(capsys, cli("doctor", "--profile", "--offload-dir", "file/below"))
    assert re.search(r"error: offload-dir \S*file is not writable: Not a directory; name another directory", said)
    assert not quick_profile.exists()
    monkeypatch.setenv("XDG_CACHE_HOME", "file")
    assert "cannot keep the hardware profile" in refused(capsys, cli("doctor", "--profile"))


@pytest.mark.parametrize(
    ("rate", "text"),
    [(1.0, "1.00 B/s"), (999.4, "999 B/s"), (12.34e9, "12.3 GB/s"), (9.999e9, "10.0 GB/s"), (7.3e14, "730 TB/s")],
)
def test_rates_are_shown_with_three_digits(rate: float, text: str) -> None:
    from flexgen_helm.commands.profiling import shown

    assert shown(rate, "B/s") == text


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"]])
def test_help(arguments: list[str], cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli(*arguments)
    assert ended.value.code == 0
    assert "flexgen-helm" in capsys.readouterr().out


def test_an_unknown_command(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'walk'" in refused(capsys, cli("walk"))


# What is there already


@pytest.mark.parametrize(
    "damage", ["", "[]", "{", '[{"name": {}}]', "\xff", "a directory", "cut off"], ids=lambda text: repr(text)[:12]
)
@pytest.mark.parametrize("file", ["stats.json", "scenario_state.json"])
def test_a_run_whose_files_are_damaged_is_not_taken_for_completed(
    file: str, damage: str, finished_run: Path, tmp_path: Path
) -> None:
    from flexgen_helm.helm.completed import damaged_files

    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    assert list(damaged_files(run)) == []
    text = (run / file).read_text()
    (run / file).unlink()
    if damage == "a directory":
        (run / file).mkdir()
    else:
        (run / file).write_text(text[: len(text) // 2] if damage == "cut off" else damage, encoding="latin-1")
    assert list(damaged_files(run)) == [file]


def test_a_damaged_run_is_run_again_where_completed_ones_are_skipped(cli: Cli, tiny_llama: Path) -> None:
    command = ("run", "-r", ENTRY, "--model", tiny_llama, "-m", 1, "--skip-completed-runs")
    assert cli(*command) == 0
    (stats,) = Path("benchmark_output/runs/default").glob("*/stats.json")
    whole, written = stats.read_text(), stats.stat().st_mtime_ns
    assert cli(*command) == 0
    assert stats.stat().st_mtime_ns == written
    stats.write_text(whole[: len(whole) // 2])
    assert cli(*command) == 0
    assert json.loads(stats.read_text())


def test_a_run_of_other_settings_is_run_again_where_completed_ones_are_skipped(
    cli: Cli,
    tiny_chat: Path,
    fake_engines: list[FakeEngine],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """HELM's name of the run is the same each time; where a policy places things changes no result.

    All of a run's files are read to know that, once for each command.
    """
    looked: list[str] = []

    def noted(*args: Any) -> str:
        looked.append(lack_of(*args))
        return looked[-1]

    monkeypatch.setattr("flexgen_helm.helm.runner.lack_of", noted)
    longer = f"{ENTRY},increase_max_tokens=2"
    commands: tuple[tuple[str, tuple[Any, ...], str], ...] = (
        (ENTRY, (1,), ""),
        (ENTRY, (1, "--gpu-batch-size", 7), ""),
        (ENTRY, (2,), "max_eval_instances (1 then, 2 now)"),
        (longer, (2,), "max_tokens (20 then, 22 now)"),
        (longer, (2, "--apply-chat-template", "no"), "apply_chat_template (unset then, False now)"),
        (longer, (2, "--max-sequence-length", 300), "max_sequence_length ("),
        (longer, (2, "--compress-weight", 8), "compress-weight (unset then, 8 now)"),
        (longer, (2, "--compress-weight", 8), ""),
    )
    common = ("run", "--model", tiny_chat, "--skip-completed-runs", "--disable-cache")
    for number, (entry, more, told) in enumerate(commands):
        before = sum(len(engine.calls) for engine in fake_engines)
        assert cli(*common, "-r", entry, "-m", *more) == 0
        calls = sum(len(engine.calls) for engine in fake_engines) - before
        assert calls == (number == 0 or told != "")
        assert told in caplog.text
        assert (len(looked), bool("".join(looked))) == (min(number, 1), told != "")
        looked.clear()
        caplog.clear()
    assert len(list(Path("benchmark_output/runs/default").glob("*/stats.json"))) == 1


def test_a_run_with_failed_requests_is_run_again_where_completed_ones_are_skipped(
    cli: Cli, tiny_llama: Path, fake_engines: list[FakeEngine]
) -> None:
    """HELM's own reader says of each state whether it was answered."""
    from helm.benchmark.adaptation.scenario_state import ScenarioState
    from helm.common.codec import from_json

    def answered() -> list[bool]:
        (file,) = Path("benchmark_output/runs/default").glob("*/scenario_state.json")
        return [state.result.success for state in from_json(file.read_bytes(), ScenarioState).request_states]

    command = ("run", "-r", ENTRY, "--model", tiny_llama, "-m", 3, "--skip-completed-runs", "--disable-cache")
    assert cli(*command) == 0
    asked = [job.prompt for job in fake_engines[0].calls[0]]
    assert cli(*command) == 0
    assert len(fake_engines[0].calls) == 1
    shutil.rmtree("benchmark_output")
    fake_engines[0].bad_tokens = set(asked[0]) - set(asked[1]) - set(asked[2])
    assert cli(*command) == 1
    assert sorted(answered()) == [False, True, True]
    fake_engines[0].bad_tokens = set()
    assert cli(*command) == 0
    assert answered() == [True, True, True]


@pytest.fixture(scope="module")
def finished_run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that ended well."""
    output = tmp_path_factory.mktemp("finished")
    where = ("-o", str(output), "--local-path", str(output / "env"))
    assert main(["run", "-r", ENTRY, "--model", str(tiny_llama), "-m", "2", *where]) == 0
    (stats,) = output.glob("runs/default/*/stats.json")
    return stats.parent


# Names that no file system takes


@pytest.mark.parametrize("suite", ["../x", "/abs", "", "..", "a\nb", "x" * 250, "a.partial"])
@pytest.mark.parametrize("command", ["run", "verify"])
def test_a_suite_that_would_not_lie_beside_the_others(
    command: str, suite: str, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "suite" in refused(capsys, cli(command, "-r", ENTRY, "--model", "m/m", "--suite", suite))
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_a_run_whose_directory_would_have_too_long_a_name(
    command: str, cli: Cli, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / (command[0] * 120)
    shutil.copytree(tiny_llama, model)
    said = refused(capsys, cli(command, "-r", ENTRY, "--model", model, "-m", 1, "--suite", "mine"))
    assert re.search(r"has \d{3} bytes and a directory's at most 255", said)
    assert not list(Path.cwd().iterdir())


def test_a_suite_on_another_file_system_is_refused_before_anything_is_computed(
    cli: Cli, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == Path().stat().st_dev:
        pytest.skip("needs two file systems")
    Path("benchmark_output/runs").mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=other) as folder:
        Path("benchmark_output/runs/linked").symlink_to(folder)
        said = refused(capsys, cli("sweep", "-r", ENTRY, "--model", tiny_llama, "-m", 1, "--suite", "linked"))
        assert "is on another file system" in said
        assert not list(Path(folder).iterdir())


def test_a_number_of_trials_that_nobody_waits_for(
    cli: Cli, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, cli("run", "-r", f"{ENTRY},num_train_trials=1000000", "--model", tiny_llama, "-m", 1))
    assert "num_train_trials 1000000 is not a number from 1 to 1000" in said
    assert "from 1 to 1000" in refused(capsys, cli("run", "-r", ENTRY, "-t", 0, "--model", tiny_llama, "-m", 1))
