"""Protects: `--apply-chat-template` decides what prompts look like, is told, and stands in the suite's record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_engine import FakeEngine

ENTRY = "synthetic_reasoning_natural:difficulty=easy"
Cli = Callable[..., int]


def expected_ids(model: Path, suite: Path, *, templated: bool) -> list[tuple[int, ...]]:
    """Ids of the run's prompts, as transformers makes them with the chat template, or without."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    (file,) = suite.glob("*/scenario_state.json")
    prompts = [state["request"]["prompt"] for state in json.loads(file.read_text())["request_states"]]
    if not templated:
        return [tuple(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [tuple(tokenizer.apply_chat_template(each, **options)) for each in conversations]


def deployment(local_path: str) -> dict[str, Any]:
    (found,) = yaml.safe_load(Path(local_path, "model_deployments.yaml").read_text())["model_deployments"]
    return dict(found)


@pytest.mark.parametrize(
    ("command", "word", "templated"), [("run", "yes", True), ("run", None, True), ("sweep", "no", False)]
)
def test_prompts_are_what_the_flag_says(
    command: str,
    word: str | None,
    templated: bool,
    cli: Cli,
    tiny_chat: Path,
    fake_engines: list[FakeEngine],
    capfd: pytest.CaptureFixture[str],
) -> None:
    flags = [] if word is None else ["--apply-chat-template", word]
    assert cli(command, "-r", ENTRY, "--model", tiny_chat, "-m", 2, "--suite", "one", *flags) == 0
    suite = Path("benchmark_output/runs/one")
    asked = [job.prompt for call in fake_engines[0].calls for job in call]
    assert sorted(asked) == sorted(expected_ids(tiny_chat, suite, templated=templated))
    told = capfd.readouterr()
    log = (suite / "flexgen_sweep.log").read_text() if command == "sweep" else ""
    lines = (log + told.err + told.out).splitlines()
    note = "the chat template of" if templated else "no chat template is applied"
    why = "as apply_chat_template says" if word in ("yes", "no") else "apply_chat_template is left out"
    assert any(note in line and why in line for line in lines)
    args = deployment("prod_env")["client_spec"]["args"]
    assert args.get("apply_chat_template") == {"yes": True, "no": False}.get(word or "")
    if command == "sweep":
        (model,) = json.loads((suite / "flexgen_sweep.json").read_text())["models"]
        assert model["chat_template"] == templated


def test_a_registered_deployment_is_told_otherwise_for_one_run(
    cli: Cli, tiny_chat: Path, fake_engines: list[FakeEngine], capfd: pytest.CaptureFixture[str]
) -> None:
    """HELM's prompts then leave room for the template; the file stays as it is, and where it holds a run says so."""
    assert cli("register", tiny_chat, "--name", "a/b", "--apply-chat-template", "no", "--local-path", "env") == 0
    before = deployment("env")
    assert (before["client_spec"]["args"]["apply_chat_template"], before["max_sequence_length"]) == (False, 512)
    run = ("run", "-r", f"{ENTRY},model=a/b", "--model", "a/b", "-m", 1, "--local-path", "env", "--disable-cache")
    for word, templated in ((None, False), ("yes", True), ("no", False), ("auto", False)):
        flags = [] if word is None else ["--apply-chat-template", word]
        for engine in fake_engines:
            engine.calls.clear()
        assert cli(*run, "--suite", str(word), *flags) == 0
        asked = [job.prompt for engine in fake_engines for call in engine.calls for job in call]
        assert asked == expected_ids(tiny_chat, Path("benchmark_output/runs", str(word)), templated=templated)
        kept = "flexgen/b has apply_chat_template False by its entry in model_deployments.yaml"
        assert (kept in capfd.readouterr().out) == (word in (None, "auto"))
    assert deployment("env") == before


def test_room_for_a_template_that_the_registered_deployment_does_without(tiny_chat: Path, tmp_path: Path) -> None:
    from flexgen_helm.runs.models import Models, our_deployment
    from flexgen_helm.runs.registration import entries_for, register_in_process

    register_in_process(entries_for(str(tiny_chat), name="room/for", apply_chat_template=False))
    Models(policy=None, apply_chat_template=True).target("room/for")
    found = our_deployment("room/for")
    assert found is not None
    told = entries_for(str(tiny_chat), name="room/for", apply_chat_template=True).deployment
    assert (found.max_sequence_length, found.client_spec) == (told.max_sequence_length, told.client_spec)
    assert told.max_sequence_length is not None
    assert told.max_sequence_length < 500


@pytest.mark.parametrize("command", [("run", "-r", ENTRY, "-m", 1), ("register",), ("verify", "-r", ENTRY)])
def test_a_template_that_there_is_not_cannot_be_applied(
    command: tuple[Any, ...], cli: Cli, tiny_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = (tiny_llama,) if command[0] == "register" else ("--model", tiny_llama)
    assert cli(*command, *model, "--apply-chat-template", "yes") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "has no chat template" in line
    assert not list(Path.cwd().iterdir())


def test_other_words_are_refused(cli: Cli, tiny_chat: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli("run", "-r", ENTRY, "--model", tiny_chat, "--apply-chat-template", "perhaps") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "choose from" in line
    assert "'perhaps'" in line
