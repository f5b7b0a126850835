"""Protects: no command runs code of a model's directory, whatever stands on standard input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexgen_helm.run import main

CODE = """
from pathlib import Path
Path({marker!r}).write_text("it ran")
from transformers import LlamaConfig as MyConfig, PreTrainedTokenizerFast as MyTokenizer
"""


@pytest.fixture
def with_code(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model whose tokenizer, and whose kind of configuration, are code in its directory."""
    folder = tmp_path / tmp_path.name
    shutil.copytree(tiny_llama, folder)
    (folder / "evil.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    for name, changes in {
        "tokenizer_config.json": {
            "tokenizer_class": "MyTokenizer",
            "auto_map": {"AutoTokenizer": ["evil.MyTokenizer", "evil.MyTokenizer"]},
        },
    }.items():
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that were put to standard input, each of which is answered with yes."""
    questions: list[str] = []

    def answer(question: object = "") -> str:
        questions.append(str(question))
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    return questions


COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "complete": lambda model: ["complete", "--model", str(model), "a"],
    "register": lambda model: ["register", str(model)],
    "run": lambda model: ["run", "-r", "simple_mcqa", "--model", str(model), "-m", "1"],
}


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_model_with_code_of_its_own_is_refused_without_a_question(
    command: str, with_code: Path, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert main(COMMANDS[command](with_code)) == 2
    assert asked == []
    assert not (tmp_path / "marker").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert "tokenizer" in line
    assert "custom code" in line
    assert not list(here.iterdir())


def test_the_reference_does_not_ask_either(with_code: Path, asked: list[str], tmp_path: Path) -> None:
    from engine.checkpoint.description import describe
    from engine.policy import Policy
    from flexgen_helm.fidelity.reference import Reference, find_place

    description = describe(str(with_code))
    with pytest.raises(Exception, match="custom code"):
        Reference.load(description, find_place(description, Policy()))
    assert asked == []
    assert not (tmp_path / "marker").exists()


def test_helm_loads_a_registered_tokenizer_without_a_question(
    with_code: Path, tiny_llama: Path, asked: list[str], tmp_path: Path
) -> None:
    """The entry of a directory that got its code later."""
    from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer

    from flexgen_helm.runs.registration import entries_for

    args: dict[str, Any] = dict(entries_for(str(tiny_llama)).tokenizer.tokenizer_spec.args or {})
    args["pretrained_model_name_or_path"] = str(with_code)
    with pytest.raises(Exception, match="custom code"):
        HuggingFaceTokenizer.create_tokenizer(**args)
    assert asked == []
    assert not (tmp_path / "marker").exists()
