"""Protects: no command sends a terminal what others wrote as it is, or the network anything that nobody asked for."""

from __future__ import annotations

import io
import json
import re
import socket
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from helm.benchmark.run_spec import RunSpec
from made_suites import answers, make_suite

from engine.errors import ConfigError
from engine.policy import Policy
from flexgen_helm.helm.requests.model_sampling import ModelSampling
from flexgen_helm.helm.requests.shaping import Shaping
from flexgen_helm.helm.scores import Score
from flexgen_helm.run import COMMANDS, main
from flexgen_helm.runs.names import check_suite_name, default_model_name
from flexgen_helm.suites.suite import is_lower_better, read_suite

ESCAPE = "\x1b]0;title\x07\x1b[31m\x9b2J\u202e"
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Terminal(io.StringIO):
    """What a terminal is sent."""

    def isatty(self) -> bool:
        return True


def shown(line: list[str]) -> tuple[Any, str]:
    """The exit code of a command line, and what it sends the terminal that it is given."""
    terminal = Terminal()
    with redirect_stdout(terminal), redirect_stderr(terminal):
        try:
            code: Any = main(line)
        except SystemExit as ended:  # of lm-evaluation-harness
            code = ended.code
    return code, terminal.getvalue()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_terminal_is_sent_no_commands_that_stand_in_a_command_line(command: str) -> None:
    code, sent = shown([command, f"--{ESCAPE}", ESCAPE, ESCAPE, "--model", "x"])
    assert code == 2
    assert "title" in sent
    assert not CONTROLS.search(sent)


def hostile_suite(folder: Path) -> Path:
    subject = ESCAPE.replace("/", "_")
    return make_suite(folder / "runs", "hostile", {subject: answers(3)}, started="2026-11-21T01:00:00+00:00",
                      failed={f"failed {subject}": ESCAPE}, commit=ESCAPE)  # fmt: skip


@pytest.mark.parametrize("command", ["compare", "report"])
def test_neither_is_one_that_names_of_runs_hold(command: str, tmp_path: Path) -> None:
    suite = hostile_suite(tmp_path)
    code, sent = shown([command, str(suite), *([str(suite)] if command == "compare" else [])])
    assert code in (0, 1)
    assert sent
    assert not CONTROLS.search(sent)


@pytest.mark.parametrize("function", ["subprocess.call", "helm.common.general.shell"])
def test_files_of_a_suite_choose_no_code_that_is_run(function: str, tmp_path: Path) -> None:
    suite = make_suite(tmp_path / "runs", "hostile", {"subject": answers(3)})
    for file in suite.glob("*/run_spec.json"):
        spec = json.loads(file.read_text())
        # A metric that is not among those of which it is known which way is better: its class is asked.
        spec["scenario_spec"] = {"class_name": function, "args": {"args": ["touch", str(tmp_path / "it-ran")]}}
        spec["metric_specs"] = [spec["scenario_spec"]]
        file.write_text(json.dumps(spec))
    run = replace(next(iter(read_suite(suite).runs.values())), score=Score("run", "model", "odd", "test", 3, 1.0))
    assert not is_lower_better(run)
    for line in (["report", str(suite)], ["compare", str(suite), str(suite)]):
        assert shown(line)[0] == 0
    assert not (tmp_path / "it-ran").exists()


def test_nor_one_that_files_of_a_model_hold(tmp_path: Path) -> None:
    model = tmp_path / f"model {ESCAPE}".replace("/", "_")
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": ESCAPE, "architectures": [ESCAPE]}))
    (model / "tokenizer.json").write_text(json.dumps({ESCAPE: ESCAPE}))
    for line in (["register", str(model)], ["complete", "--model", str(model), ESCAPE], ["check", str(model)]):
        code, sent = shown(line)
        assert code == 2
        assert "title" in sent
        assert not CONTROLS.search(sent)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The places of a network that somebody wants to reach, which none can."""
    places: list[Any] = []

    def refuse(*place: Any, **_: Any) -> NoReturn:
        places.append(place)
        raise OSError("there is no network")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    return places


def test_nothing_is_fetched_for_a_model_of_this_machine(
    asked: list[Any],
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    suite = hostile_suite(tmp_path)
    for line in (
        ["register", str(tiny_llama)],
        ["complete", "--model", str(tiny_llama), "a", "--max-new-tokens", "2"],
        ["report", str(suite)],
        ["compare", str(suite), str(suite)],
        ["plan", "--shape", "opt-125m", "--gpu-memory", "1GB", "--cpu-memory", "4GB"],
    ):
        assert main(line) in (0, 1, 2), capsys.readouterr().err
    assert asked == []


def test_the_guard_sees_what_is_fetched(asked: list[Any], tmp_path: Path) -> None:
    """A name of the hub is asked for, and told as not reached."""
    assert main(["complete", "--model", "nobody/has-this-model", "a"]) == 2
    assert asked


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "..", ".", "a\\b", "a\nb", "", "x.partial", "\x1b[31m"])
def test_no_suite_lies_elsewhere(name: str) -> None:
    with pytest.raises(ConfigError):
        check_suite_name(name)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a:b=../../x,model=c", "a:b=/x"])
def test_no_run_lies_outside_its_suite(name: str, tmp_path: Path) -> None:
    """HELM writes another sign for separators in the names of runs, those read from files included."""
    spec = RunSpec(name=name, scenario_spec=None, adapter_spec=None, metric_specs=[], groups=[])  # type: ignore[arg-type]
    assert (tmp_path / spec.name).resolve().parent == tmp_path.resolve()


@pytest.mark.parametrize("source", ["../..", "/a/../b", "a b/\x1b[31m", "x:y,z=1", "\u202e"])
def test_a_models_directory_makes_no_path(source: str) -> None:
    assert re.fullmatch(r"local/[A-Za-z0-9._-]+", default_model_name(source, is_local=True))


ARGS: dict[str, dict[str, Any]] = {
    "top_k 'many' of": {"top_k": "many"},
    "top_k True of": {"top_k": True},
    "apply_chat_template 'yes' of": {"apply_chat_template": "yes"},
    r"chat_template_kwargs \[1\] of": {"chat_template_kwargs": [1]},
}


@pytest.mark.parametrize("told", ARGS)
def test_args_of_a_deployment_of_another_kind_are_refused_by_name(told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Shaping.of(ARGS[told])


@pytest.mark.parametrize("spec", [35, ["auto"], 1.5, True, b"auto"])
def test_a_policy_that_is_no_name_is_refused(spec: Any) -> None:
    with pytest.raises(ConfigError, match="neither a name, a file nor a mapping"):
        Policy.load(spec)


@pytest.mark.parametrize(
    "config", [{"top_p": {"a": 1}}, {"temperature": "0.5"}, {"top_k": 2.5}, {"top_p": 7}, {"temperature": float("inf")}]
)
def test_sampling_that_a_model_cannot_mean_is_refused_by_its_file(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        ModelSampling.of("model", {"do_sample": True, **config}, model="m", top_k=None)
