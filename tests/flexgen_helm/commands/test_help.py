"""Protects: every command reads its flags without HELM and torch, and its help shows command lines that work."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flexgen_helm.run import COMMANDS, main
from flexgen_helm.terminal.errors import UsageError

ROOT = Path(__file__).resolve().parents[3]
HEAVY = ("helm", "torch", "transformers", "pandas", "datasets", "lm_eval.evaluator")

WRONG_FLAGS = """
import sys
from flexgen_helm.run import COMMANDS, main
for command in COMMANDS:
    try:
        code = main([command, "--bogus"])
    except SystemExit as ended:  # lm-evaluation-harness refuses its flags itself
        code = ended.code
    print(command, code, [name for name in {heavy} if name in sys.modules])
"""


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_a_wrong_flag_is_refused_before_helm_and_torch_are_imported(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = WRONG_FLAGS.format(heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    light = "[]"
    assert done.stdout.splitlines() == [f"{command} 2 {light}" for command in COMMANDS], done.stderr
    assert not list(tmp_path.iterdir())


def test_the_help_of_every_command_ends_with_examples(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexgen_helm.commands.bench import bench_parser
    from flexgen_helm.commands.check import check_parser
    from flexgen_helm.commands.complete import complete_parser
    from flexgen_helm.commands.completion.serve import serve_parser
    from flexgen_helm.commands.doctor import doctor_parser
    from flexgen_helm.commands.first_steps.demo import demo_parser
    from flexgen_helm.commands.plan import plan_parser
    from flexgen_helm.commands.register import register_parser
    from flexgen_helm.commands.sweep import sweep_parser
    from flexgen_helm.runs.flags import run_parser

    monkeypatch.setattr(sys, "argv", [])
    parsers: dict[str, Callable[[], argparse.ArgumentParser]] = {
        "run": run_parser,
        "sweep": sweep_parser,
        "register": register_parser,
        "complete": complete_parser,
        "bench": bench_parser,
        "check": check_parser,
        "demo": demo_parser,
        "doctor": doctor_parser,
        "plan": plan_parser,
        "serve": serve_parser,
        "verify": run_parser,
    }
    for command in COMMANDS:
        shown = help_of(command, capsys)
        _, _, listed = shown.partition("\nexamples:\n")
        examples = re.findall(r"^  (flexgen-helm .*)$", listed, re.MULTILINE)
        assert 2 <= len(examples) <= 3, shown
        for line in examples:
            name, *words = shlex.split(line, comments=True)[1:]
            assert name == command
            if command in parsers:
                parsers[command]().parse_args(words)


@pytest.mark.parametrize("command", ["run", "sweep", "verify", "complete", "serve", "register", "plan", "lm-eval"])
def test_memory_limits_are_flags_of_every_command_that_places_a_model(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    shown = help_of(command, capsys)
    assert "--gpu-memory SIZE" in shown
    assert "--cpu-memory SIZE" in shown


def test_our_flags_come_first_and_helms_after_them(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("run", "sweep", "verify"):
        shown = help_of(command, capsys)
        titles = [line.removesuffix(":") for line in shown.splitlines() if re.fullmatch(r"\S.*:", line)]
        assert titles == ["options", "model", "what to run", "policy", "output", "HELM", "examples"]


def test_a_flag_is_refused_in_one_line_that_names_the_help() -> None:
    from flexgen_helm.runs.flags import run_parser

    with pytest.raises(UsageError, match=r"--bogus \(see flexgen-helm run --help\)"):
        run_parser().parse_args(["--bogus"])


BAD_NAMES = {
    "a long name": ("x" * 300, "has a name of 300 bytes, and file systems take 255"),
    "a long name of few letters": ("é" * 128, "has a name of 256 bytes"),
    "a long path": ("/x" * 3000, "has 6000 bytes, and a path at most 4095"),
    "nobody's home": ("~nosuchuser/x", "home directory of a user who has none here"),
    "no UTF-8": ("caf\udce9", "is not UTF-8"),
}
FILES = {
    "run": ("--model", "--path", "--policy", "-c", "-o", "--run-path", "--local-path", "--offload-dir", "--log-config"),
    "sweep": ("--model", "--policy", "--json-log", "-o", "--suite", ""),
    "verify": ("--model", "--policy", "-c", "-o"),
    "complete": ("--model", "--policy", "--input", "--output", "--offload-dir"),
    "serve": ("--model", "--policy", "--offload-dir"),
    "register": ("", "--policy", "--local-path"),
    "plan": ("--shape", "--hardware", "--write", "--offload-dir"),
    "bench": ("--shape", "--policy", "--out"),
    "report": ("", "--previous", "--reference", "-o"),
    "compare": ("", "--json", "-o"),
    "check": ("", "--json"),
    "demo": ("-o",),
    "doctor": ("--offload-dir",),
}
NEEDED = {
    "check": ["m/m"],
    "complete": ["--model", "m"],
    "plan": ["--shape", "opt-125m"],
    "register": ["m/m"],
    "report": ["s"],
    "serve": ["--model", "m"],
}


@pytest.mark.parametrize("bad", list(BAD_NAMES))
@pytest.mark.parametrize("command", list(FILES))
def test_names_that_no_file_can_have_are_refused_in_one_line(
    command: str, bad: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, reason = BAD_NAMES[bad]
    for flag in FILES[command]:
        named = [flag, name] if flag else [name]
        needed = ["a", "b"][not flag :] if command == "compare" else [] if not flag else NEEDED.get(command, [])
        assert main([command, *needed, *named]) == 2, flag
        (line,) = capsys.readouterr().err.splitlines()
        assert reason in line
        assert line.isascii()
    assert not list(tmp_path.iterdir())


def test_texts_may_be_as_long_as_they_are() -> None:
    from flexgen_helm.commands.complete import complete_parser
    from flexgen_helm.runs.flags import run_parser

    long = "~" + "x" * 5000
    assert run_parser().parse_args(["-r", long, "--description", long]).run_entries == [long]
    assert complete_parser().parse_args(["--model", "m", long, "caf\udce9"]).prompts == [long, "caf\udce9"]


def test_a_wrong_entry_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys; from flexgen_helm.run import main;"
        "code = main(['run', '-r', 'mmul:subject=anatomy', '--model', 'm/m']);"
        "print(code, [name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "HELM has no run entry 'mmul'; did you mean" in done.stderr
    assert done.stdout.splitlines()[-1] == "2 []"
    assert not list(tmp_path.iterdir())
