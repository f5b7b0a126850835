"""Protects: flags for thinking, template arguments and sampling, from the command line to HELM's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from thinking_models import KINDS

ENTRY = "synthetic_reasoning_natural:difficulty=easy"
Cli = Callable[..., int]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template opens its thinking."""
    return KINDS["opened by the template"].save(tmp_path_factory.mktemp("thinker") / "thinker")


def states(suite: str) -> list[Any]:
    (file,) = Path("benchmark_output/runs", suite).glob("*/scenario_state.json")
    return list(json.loads(file.read_text())["request_states"])


def told_by(suite: str, name: str) -> Any:
    return json.loads(Path("benchmark_output/runs", suite, name).read_text())


def args_of(local_path: str) -> dict[str, Any]:
    (found,) = yaml.safe_load(Path(local_path, "model_deployments.yaml").read_text())["model_deployments"]
    return dict(found["client_spec"]["args"])


def generated(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of plain transformers, end-of-text excluded."""
    import torch

    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    found: list[int] = out[0, len(prompt) :].tolist()
    return found[: found.index(0)] if 0 in found else found


def by_hand(path: Path, prompt: str, budget: int, most: int) -> tuple[str, str]:
    """Thinking and answer: plain transformers, with the end of thinking put behind the budget; cut at a line end."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()
    messages = [{"role": "user", "content": prompt}]
    ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))
    thought = generated(model, ids, budget)
    assert len(thought) == budget
    forced = [*thought, *tokenizer.encode("</think>", add_special_tokens=False)]
    answer = tokenizer.decode(generated(model, ids + forced, most - len(forced))).lstrip()
    return tokenizer.decode(thought).strip(), answer.partition("\n")[0]


def test_a_budget_and_more_room_give_answers(cli: Cli, thinker: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = ("--model", thinker, "-m", 2)
    assert cli("run", "-r", ENTRY, *model, "--suite", "short") == 0
    assert "2 answers were cut off in their thinking and are empty; give entries more room" in capfd.readouterr().out
    for state in states("short"):
        (output,) = state["result"]["completions"]
        assert (output["text"], output["tokens"], output["finish_reason"]) == ("", [], {"reason": "length"})
        assert output["thinking"]["text"]
    wide = (f"{ENTRY},increase_max_tokens=30", *model, "--thinking-budget", 4)
    assert cli("sweep", "-r", *wide, "--suite", "long") == 0
    for state in states("long"):
        (output,) = state["result"]["completions"]
        assert state["request"]["max_tokens"] == 50
        assert (output["thinking"]["text"], output["text"]) == by_hand(thinker, state["request"]["prompt"], 4, 50)
    report, record = (told_by("long", name) for name in ("report.json", "flexgen_sweep.json"))
    tokens = [len(state["result"]["completions"][0]["tokens"]) for state in states("long")]
    assert report["runs"][0]["answers"]["lengths"]["tokens"] == sum(tokens)
    assert report["runs"][0]["thinking"]["tokens"] + sum(tokens) == record["runs"][0]["new_tokens"]
    assert cli("sweep", "-r", ENTRY, *model, "--suite", "record") == 0
    (run,) = told_by("record", "flexgen_sweep.json")["runs"]
    assert run["cut_off"] == 2
    assert (run["thinking"]["texts"], run["thinking"]["median"], run["thinking"]["tokens"]) == (2, 20, 40)
    assert "2 answers were cut off" in capfd.readouterr().out


def test_flags_stand_in_the_deployment(cli: Cli, thinker: Path, tmp_path: Path) -> None:
    flags = ("--reasoning", "<a>", "</a>", "--thinking-budget", 0, "--local-path", "env")
    assert cli("register", thinker, *flags) == 0
    assert {**args_of("env"), "policy": None, "pretrained_model_name_or_path": None} == {
        "policy": None,
        "pretrained_model_name_or_path": None,
        "reasoning": {"begin": "<a>", "end": "</a>"},
        "thinking_budget": 0,
    }
    model = KINDS["opened by the model"].save(tmp_path / "model")
    assert cli("register", model, "--chat-template-kwargs", "enable_thinking=false", "--local-path", "other") == 0
    assert args_of("other")["chat_template_kwargs"] == {"enable_thinking": False}
    (model / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6}))
    assert cli("register", model, "--sampling", "model", "--local-path", "third") == 0
    assert args_of("third")["sampling"] == "model"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--reasoning", "harmony"), "has none of its marks"),
        (("--reasoning", "a", "b", "c"), "give a style, or the two strings"),
        (("--reasoning", "none", "nightly"), "none is a style by itself; put nightly before it"),
        (("--reasoning", "none", "--thinking-budget", 5), "how it thinks is not known"),
        (("--thinking-budget", -5), "no number of tokens"),
        (("--chat-template-kwargs", "enable_thinking"), "write NAME=VALUE"),
        (("--chat-template-kwargs", "thinking=1"), "does not look at 'thinking'"),
        (("--sampling", "model"), "does not say do_sample: true"),
    ],
)
def test_what_cannot_be_meant_leaves_nothing_behind(
    flags: tuple[Any, ...], told: str, cli: Cli, thinker: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli("run", "-r", ENTRY, "--model", thinker, "-m", 1, *flags) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert told in line
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_answers_that_leave_prompts_no_room(
    command: str, cli: Cli, thinker: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """HELM would shorten the prompt for ever."""
    entry = f"{ENTRY},increase_max_tokens=600"
    assert cli(command, "-r", entry, "--model", thinker, "-m", 1, "--suite", "none") in (1, 2)
    told = capfd.readouterr()
    assert "max_tokens 620 leaves no room for a prompt in the" in told.out + told.err


def test_verify_compares_what_a_model_chooses(cli: Cli, thinker: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = ("verify", "-r", f"{ENTRY},increase_max_tokens=4", "--model", thinker, "-m", 2)
    assert cli(*run, "--thinking-budget", 4) == 2
    assert "verify compares what a model chooses" in capfd.readouterr().err
    assert cli(*run) == 0
