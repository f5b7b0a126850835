"""Protects: files and numbers from outside are bounded, and a file that is none is told in one line without waiting."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from family_tokenizers import family_tokenizer
from helm.common.request import Request

from engine.errors import EngineError, JobError
from engine.text.prompt import PromptTokenizer
from flexgen_helm.commands.completion.prompts import BadPrompt, Settings, from_jsonl
from flexgen_helm.data_wrangling.rows import read_table
from flexgen_helm.helm.records.beginning import Beginning
from flexgen_helm.planning.dummy import shape_config
from flexgen_helm.reports.drift import _read_drift
from flexgen_helm.runs.entries import read_entries
from flexgen_helm.runs.flags import parse_run_flags
from flexgen_helm.runs.registration import check_local_path
from flexgen_helm.runs.yaml_lists import add_to_yaml_lists
from flexgen_helm.sweeps.record import read_record

pytestmark = pytest.mark.usefixtures("in_time")


def entries(file: Path) -> None:
    read_entries(parse_run_flags(["-c", str(file)]))


def add(file: Path) -> None:
    add_to_yaml_lists([(file, "models", {"name": "a/b"})])


READERS: dict[str, Callable[[Path], Any]] = {
    "entries.conf": entries,
    "model_metadata.yaml": add,
    "model_deployments.yaml": lambda file: check_local_path(file.parent),
    "flexgen_sweep.json": lambda file: read_record(file.parent),
    "flexgen_suite.json": lambda file: Beginning(file.parent),
    "config.json": lambda file: shape_config(str(file)),
    "tableA.csv": lambda file: read_table(file, ("id",)),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["pipe", "directory", "too long"])
def test_what_is_no_such_file_is_told_in_a_line(name: str, kind: str, tmp_path: Path) -> None:
    from flexgen_helm.helm.records import beginning

    file = tmp_path / (beginning.FILE_NAME if name == "flexgen_suite.json" else name)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    else:
        with file.open("wb") as stream:
            stream.truncate(300_000_000)
    with pytest.raises(EngineError) as caught:
        READERS[name](file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    if not (name == "config.json" and kind == "directory"):  # of which the config.json is looked for
        assert {"pipe": "is a pipe", "directory": "a directory", "too long": "more than"}[kind] in str(caught.value)


def test_a_pipe_is_no_record_of_drift(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fidelity.json")
    assert _read_drift(tmp_path / "fidelity.json") is None


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": "a", "metadata": ' + "[" * 200 + "]" * 200 + "}", "more than 100 levels deep"),
        ('{"prompt": "a", "metadata": ' + "[" * 100_000 + "]" * 100_000 + "}", "more than 100 levels deep"),
        ('{"prompt": "a", "seed": ' + "9" * 5_000 + "}", "a number of 5000 digits"),
        ('{"prompt": "a", "metadata": 1e999}', "an infinite number"),
        ('{"prompt": "a", "metadata": NaN}', "NaN"),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
    ],
    ids=["deep", "very deep", "digits", "infinite", "no number", "surrogate"],
)
def test_a_line_of_json_beyond_bounds_is_a_bad_prompt(line: str, told: str) -> None:
    (found,) = from_jsonl([line], "prompts.jsonl", Settings())
    assert isinstance(found, BadPrompt)
    assert told in found.reason
    assert "\n" not in found.reason


@pytest.mark.parametrize("count", [0, -1, 10**9])
def test_no_request_asks_for_a_billion_completions(
    make_client: Callable[..., Any], fake_engines: list[FakeEngine], count: int
) -> None:
    request = Request(model="local/tiny", prompt="a", temperature=1.0, max_tokens=5, num_completions=count)
    client = make_client()
    with pytest.raises(JobError, match=f"num_completions {count} is not a number from 1 to 10000"):
        client.check([request])
    assert not client.make_request(request).success


def test_a_prompt_that_a_tokenizer_would_fill_the_memory_with(
    make_client: Callable[..., Any], fake_engines: list[FakeEngine]
) -> None:
    text = "x" * 60_000_000
    prompts = PromptTokenizer.of(family_tokenizer("gpt-2"))
    for ask in (lambda: prompts.plain(text), lambda: prompts.rendered(text), lambda: prompts.chat([{"content": text}])):
        with pytest.raises(JobError, match="60,000,000 characters, more than 8,000,000"):
            ask()
    request = Request(model="local/tiny", prompt=text, temperature=0.0, max_tokens=1)
    with pytest.raises(EngineError, match="60,000,000 characters"):
        make_client().check([request])


def test_complete_refuses_both_beforehand(tmp_path: Path, tiny_llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from flexgen_helm.run import main

    (tmp_path / "long.txt").write_text("x" * 60_000_000)
    for arguments, told in (
        (["-i", str(tmp_path / "long.txt")], "60,000,000 characters"),
        (["a", "-n", "1000000000"], "num_completions 1000000000 is not a number from 1 to 10000"),
    ):
        assert main(["complete", "--model", str(tiny_llama), *arguments]) == 2
        assert told in capfd.readouterr().err.splitlines()[-1]


def test_complete_counts_characters_before_it_tokenizes(
    tmp_path: Path, tiny_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a window of 128 tokens, where a tokenizer needs more than half a minute for a prompt of 8 MB."""
    from flexgen_helm.run import main

    (tmp_path / "long.txt").write_text("a b " * 1_900_000)
    assert main(["complete", "--model", str(tiny_llama), "-i", str(tmp_path / "long.txt")]) == 2
    told = capfd.readouterr().err.splitlines()[-1]
    assert "7,600,000 characters, more than 100,000, which the model's window of" in told


def test_no_prompt_is_refused_for_its_characters_that_may_fit() -> None:
    from engine.text.prompt import check_characters

    check_characters(32 * 10_000, 10_000)
    check_characters(100_000, 16)
    check_characters(8_000_000, None)
    check_characters(8_000_000, 1_000_000)
    with pytest.raises(JobError, match="320,001 characters, more than 320,000, which the model's window of 10000"):
        check_characters(32 * 10_000 + 1, 10_000)


@pytest.mark.parametrize("command", ["register", "complete"])
def test_a_chat_template_that_does_not_end_is_told(
    command: str, tmp_path: Path, tiny_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from flexgen_helm.run import main

    model, local = tmp_path / "model", tmp_path / "prod_env"
    shutil.copytree(tiny_llama, model)
    loop = "{% for a in range(99999) %}"
    (model / "chat_template.jinja").write_text(f"{loop}{loop}{{% endfor %}}{{% endfor %}}")
    rest = {
        "register": [str(model), "--local-path", str(local)],
        "complete": ["--model", str(model), "--chat", "hello"],
    }
    assert main([command, *rest[command]]) == 2
    assert "does not end" in capfd.readouterr().err.splitlines()[-1]
    assert not local.exists()
    if command == "register":
        assert main([command, *rest[command], "--apply-chat-template", "no"]) == 0
