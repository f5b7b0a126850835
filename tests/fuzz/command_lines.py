"""Fuzz targets of the command line: every command with generated flags and files, and run entries."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import files
from changes import TEXTS, maybe_damaged
from door import LIMIT_S, BadLine, Door, check_line
from files import BODY, CHAT_LINE, OWN_LINE
from hypothesis import strategies as st
from model_files import model_directory

from engine.errors import ConfigError

CODES = {0, 1, 2}
COMMANDS = ("run", "sweep", "register", "complete", "serve", "bench", "plan", "check", "verify", "compare", "reproduce")
COMMANDS += ("report", "doctor")
"""All commands but `lm-eval`, which passes its command line on to the harness."""
ENTRIES = (
    *(
        "simple_mcqa",
        "simple_mcqa:model=local/model",
        "mmlu:subject=anatomy",
        "synthetic_reasoning_natural:difficulty=easy",
    ),
    *(
        "data_wrangling:task=error_detection",
        "nope",
        "mmlu",
        "mmlu:subject=",
        "simple_mcqa:model=text,num_train_trials=0",
    ),
    *(
        "simple_mcqa:model=../../x",
        "simple_mcqa:model=a/../../b",
        "simple_mcqa:model_deployment=../x",
        ":",
        "a:b=c=d,,",
    ),
)


class _Found(BaseException):
    """Carries a command's parser out of the command."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(command: str) -> argparse.ArgumentParser:
    """Return the parser of a command."""
    from flexgen_helm.run import main
    from flexgen_helm.terminal.parser import Parser

    def caught(parser: argparse.ArgumentParser, *_: Any) -> Any:
        raise _Found(parser)

    try:
        with mock.patch.object(Parser, "parse_args", caught), mock.patch.object(Parser, "parse_known_args", caught):
            main([command])
    except _Found as found:
        return found.parser
    raise AssertionError(f"{command} reads no command line")


@functools.cache
def world() -> Path:
    """Create a directory of files that command lines refer to."""
    folder = files.SCRATCH / "world"
    folder.mkdir()
    shutil.copytree(model_directory(), folder / "model")
    shutil.copytree(model_directory(), folder / "half")
    (folder / "half" / "model.safetensors").unlink()
    (folder / "policy.yaml").write_text("gpu-batch-size: 4\ndevice: cpu\n")
    (folder / "bad.yaml").write_text("gpu-batch-size: [4\n")
    (folder / "lines.txt").write_text("a\n\nb c\n")
    (folder / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (OWN_LINE, CHAT_LINE)))
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {**BODY, "model": "model"}}
    (folder / "batch.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "entries.conf").write_text('entries: [{description: "simple_mcqa:model=text", priority: 1}]\n')
    (folder / "empty").write_text("")
    (folder / "garbage").write_bytes(bytes(range(256)))
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nothing")
    suite = folder / "out" / "runs" / "s"
    for run in ("simple_mcqa:model=local_model", "empty"):
        (suite / run).mkdir(parents=True)
    (suite / "simple_mcqa:model=local_model" / "stats.json").write_text("[]")
    (suite / "simple_mcqa:model=local_model" / "run_spec.json").write_text("{}")
    return folder


NAMES = (
    *("model", "half", "policy.yaml", "bad.yaml", "lines.txt", "own.jsonl", "batch.jsonl", "entries.conf", "empty"),
    *(
        "garbage",
        "pipe",
        "loop",
        "dangling",
        "out",
        "out/runs/s",
        "nothing",
        "/dev/null",
        "/dev/full",
        "new/x",
        "new.jsonl",
    ),
    *("-", "s", "auto", "quick", "opt-30b-t4", "org/model", "x" * 300, "../out", "model/config.json", "out/runs/s/.."),
)
COUNTS = ("0", "1", "2", "-1", "512", "1000000000", "9" * 400, "1.5", "abc", "")
WORDS = (
    *(text for text in TEXTS if "\0" not in text and "\ud800" not in text),
    *("\udc80", "--", "-x", "16GB", "23:30"),
)


def _command_lines() -> st.SearchStrategy[tuple[str, ...]]:
    flags = {command: _flags(parser_of(command)) for command in COMMANDS}
    numbers = st.integers(0, (1 << 16) - 1)

    @st.composite
    def made(draw: Any) -> tuple[str, ...]:
        command = COMMANDS[draw(numbers) % len(COMMANDS)]
        line = [command]
        if command not in ("compare", "reproduce", "report", "doctor") and draw(numbers) % 4:
            line += [*(["--model"] if command != "register" and command != "check" else []), "model"]
        for _ in range(draw(numbers) % 4):
            names, values = flags[command][draw(numbers) % len(flags[command])]
            line += [names[draw(numbers) % len(names)]] if names else []
            for _ in range(values[1] if len(values[0]) else 0):
                known = values[0] if draw(numbers) % 5 else WORDS
                line.append(known[draw(numbers) % len(known)])
        if command == "complete" and draw(numbers) % 2:
            line += ["a"] if draw(numbers) % 2 else ["-i", "own.jsonl"]
        if command == "run" and draw(numbers) % 4:
            line += ["-r", ENTRIES[draw(numbers) % len(ENTRIES)], "-m", "1"]
        if command == "sweep" and draw(numbers) % 4:
            line += ["--suite", "s", "entries.conf", "-m", "1"]
        return tuple(line)

    return made()


def _flags(parser: argparse.ArgumentParser) -> list[tuple[list[str], tuple[Sequence[str], int]]]:
    """Return the names of each argument, the values to give it, and how many of them."""
    found = []
    for action in parser._actions:
        values: Sequence[str] = [*NAMES, *ENTRIES]
        if action.choices is not None:
            values = list(map(str, action.choices))
        elif action.type is not None:
            values = [*COUNTS, "yes", "4", "8", "lossless", "bucket", "true", "1,2"]
        count = 6 if action.dest == "percent" else 0 if action.nargs == 0 else 1
        if action.dest in ("run_path", "port", "debug", "max_eval_instances"):
            continue
        found.append((list(action.option_strings), (values, count)))
    return found


def _let_commands_in() -> Callable[[tuple[str, ...]], None]:
    """Import everything that commands need, so that their processes can be forked from this one."""
    for name in ("engine.engine", "helm.clients.auto_client", "flexgen_helm.sweeps.runner", "flexgen_helm.runs.launch"):
        importlib.import_module(name)
    from in_this_process import load_in_this_process

    from flexgen_helm.planning.auto_policy import resources_here
    from flexgen_helm.workers import helper_processes
    from flexgen_helm.workers.engine_processes import engine_processes

    engine_processes.load = load_in_this_process  # type: ignore[method-assign, assignment]
    engine_processes.prepare = lambda: None  # type: ignore[method-assign]
    engine_processes.resources = engine_processes.last_resources = resources_here  # type: ignore[method-assign]
    helper_processes.usable_cores = lambda: 1  # type: ignore[attr-defined]
    folder, kept = world(), files.SCRATCH / "kept"
    shutil.copytree(folder, kept, symlinks=True, ignore=lambda *_: ["pipe"])

    def enter(line: tuple[str, ...]) -> None:
        """A command must end in time with a documented exit code and a one-line error; refused, it leaves no files."""
        before = _seen(folder)
        code, told = _run(line, folder)
        after = _seen(folder)
        try:
            _check(line[0], code, told)
            if code == 2 and after != before:
                raise BadLine(f"refused, and left {sorted(after ^ before)[:10]}")
        finally:
            if after != before:
                shutil.rmtree(folder)
                shutil.copytree(kept, folder, symlinks=True)
                os.mkfifo(folder / "pipe")
        if code:
            raise ConfigError("refused")

    return enter


def _seen(folder: Path) -> set[tuple[str, int, int]]:
    found = set()
    for each in folder.rglob("*"):
        status = each.lstat()
        found.add((str(each.relative_to(folder)), status.st_size if each.is_file() else 0, status.st_mode))
    return found


def _run(line: Sequence[str], folder: Path) -> tuple[int, str]:
    """Run a command and return its exit code and standard error; kill it if it takes too long."""
    output = files.SCRATCH / "stderr"
    child = os.fork()
    if child == 0:
        _command(line, folder, output)
    try:
        _, status = os.waitpid(child, 0)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        raise
    return os.waitstatus_to_exitcode(status), output.read_text(errors="replace")


def _command(line: Sequence[str], folder: Path, output: Path) -> None:
    code = 70
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.chdir(folder)
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(1, 0)
        sys.stdin, sys.stdout, sys.stderr = (
            io.TextIOWrapper(os.fdopen(number, mode, closefd=False), write_through=True)  # type: ignore[arg-type]
            for number, mode in ((0, "rb"), (1, "wb"), (2, "wb"))
        )
        from flexgen_helm.run import main

        with mock.patch("asyncio.run", side_effect=KeyboardInterrupt):  # `serve` is ready then
            code = main(list(line))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(code)


def _check(command: str, code: int, told: str) -> None:
    if "Traceback (most recent call last)" in told or code not in CODES | {130}:
        raise BadLine(f"exit code {code}: {told[-2500:]}")
    if code in (1, 2):
        lines = [each for each in told.splitlines() if each.strip()]
        if code == 2 and command != "check" and (not lines or not lines[-1].startswith("flexgen-helm: error: ")):
            raise BadLine(f"exit code {code} without a line that says why: {told[-2500:]}")
        if code == 2 and lines:  # `check` prints its findings on standard output
            check_line(lines[-1])


def _entries() -> st.SearchStrategy[tuple[str, ...]]:
    arguments = (
        "model",
        "model_deployment",
        "subject",
        "num_train_trials",
        "max_train_instances",
        "difficulty",
        "task",
        "method",
    )
    arguments += (
        "data_augmentation",
        "dataset",
        "num_outputs",
        "instructions",
        "temperature",
        "stop",
        "groups",
        "prompt",
    )
    values = (
        "text",
        "local/model",
        "all",
        "canonical",
        "0",
        "-1",
        "1000001",
        "a/b",
        "../..",
        "[1]",
        "{}",
        "anatomy",
        "easy",
        *WORDS,
    )
    numbers = st.integers(0, (1 << 16) - 1)

    @st.composite
    def made(draw: Any) -> str:
        known = _entry_names()
        name = known[draw(numbers) % len(known)]
        pairs = [
            f"{arguments[draw(numbers) % len(arguments)]}={values[draw(numbers) % len(values)]}"
            for _ in range(draw(numbers) % 5)
        ]
        return f"{name}:{','.join(pairs)}" if pairs else name

    entry = made().map(lambda text: text.encode("utf-8", "replace"))
    return st.lists(
        maybe_damaged(entry, 10).map(lambda each: each.decode("utf-8", "replace")), min_size=1, max_size=2
    ).map(tuple)


@functools.cache
def _entry_names() -> list[str]:
    from helm.benchmark import run_spec

    run_spec.discover_run_spec_functions()
    return sorted(run_spec._REGISTERED_RUN_SPEC_FUNCTIONS)


def _let_entries_in() -> Callable[[tuple[str, ...]], None]:
    from helm.benchmark.config_registry import register_builtin_configs_from_helm_package

    from flexgen_helm.runs.entries import Target, assign_models, build_run_specs, check_run_spec_names, read_entries
    from flexgen_helm.runs.flags import parse_run_flags
    from flexgen_helm.runs.names import check_run_names
    from flexgen_helm.runs.registration import entries_for, register_in_process

    register_builtin_configs_from_helm_package()
    model = str(model_directory())
    made = entries_for(model)
    register_in_process(made)

    def enter(entries: tuple[str, ...]) -> None:
        """Entries that are accepted must have names that make different directories."""
        args = parse_run_flags(["--model", model, "-m", "3"])
        args.run_entries = list(entries)
        read = read_entries(args)
        check_run_spec_names(read)
        target = Target(made.model.name, made.deployment.name)
        given = assign_models(read, [model], lambda _: target, skip_others=False)
        run_specs = build_run_specs(given, args)
        check_run_names(run_spec.name for run_spec in run_specs)
        for run_spec in run_specs:
            assert Path("/suite", run_spec.name).resolve().parent == Path("/suite"), run_spec.name

    return enter


def _entry_files() -> st.SearchStrategy[bytes]:
    texts = [each.read_bytes() for each in sorted((files.ROOT / "run_specs").glob("*.conf"))]
    small = b'entries: [{description: "simple_mcqa:model=text", priority: 1, groups: ["a"]}, {description: "b:c=d"}]\n'
    words = [
        b'include "x"\n',
        b"${a}",
        b'"""',
        b"{",
        b"}",
        b"[",
        b"+=",
        b"#",
        b"null",
        b"${?HOME}",
        b"\n",
        b"a.b.c = 1\n",
    ]
    words += [
        b'include url("http://localhost:9/")\n',
        b'include required(file("/dev/zero"))\n',
        b"[" * 300,
        b"{a:" * 300,
    ]
    return maybe_damaged(st.sampled_from([small, small, *texts[:3]]), 1, words)


def _enter_entry_file(content: bytes) -> None:
    from flexgen_helm.runs.entry_files import read_entry_file

    file = files.SCRATCH / "entries.conf"
    file.write_bytes(content)
    read_entry_file(file)


DOORS = [
    Door("files of run entries", _entry_files, lambda: _enter_entry_file),
    Door("run entries", _entries, _let_entries_in, is_guided=False),
    Door("command lines", _command_lines, _let_commands_in, is_guided=False, limit_s=3 * LIMIT_S),
]
