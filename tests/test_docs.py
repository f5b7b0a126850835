"""Protects: every command, policy and file that the README and the guides in docs/ show is one that works."""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import fields
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import models
import pytest
import yaml

from engine import Engine
from engine.policy import Policy, policy_directories

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "ARCHITECTURE.md")]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
GUIDES = "\n".join(TEXTS.values())
HELM = pytest.importorskip("helm.benchmark.run", reason="crfm-helm is not installed")
pytest.importorskip("flexgen_helm.plugin")  # registers our run entries


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDES, re.DOTALL)


def commands() -> list[str]:
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [shlex.join(shlex.split(line, comments=True)) for line in lines if shlex.split(line, comments=True)]


def commands_of(*program: str) -> list[list[str]]:
    split = [shlex.split(command) for command in commands()]
    return [words[len(program) :] for words in split if tuple(words[: len(program)]) == program]


RUNS = [*commands_of("python", "-m", "flexgen_helm.run"), *commands_of("flexgen-helm", "run")]


def test_every_command_is_looked_at_here() -> None:
    ours = ("flexgen-helm", "python -m flexgen_helm.run", "python -m benchmarks.rivals.run")
    known = ("make", "pip", "inspect eval", "helm-", *ours)
    assert [command for command in commands() if not command.startswith(known)] == []  # scripts are blocks of `bash`
    assert len(RUNS) >= 5


@pytest.mark.parametrize("arguments", RUNS, ids=" ".join)
def test_runs_are_accepted(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flexgen_helm.runs.entries import check_run_spec_names, read_entries
    from flexgen_helm.runs.flags import parse_run_flags, policy_from_flags

    monkeypatch.chdir(tmp_path)
    Path("my_entries.conf").write_text('entries: [{description: "simple_mcqa", priority: 1}]')
    args = parse_run_flags(arguments)
    assert Policy.load(policy_from_flags(args)) is not None
    check_run_spec_names(read_entries(args))


@pytest.mark.parametrize("arguments", commands_of("helm-run"), ids=" ".join)
def test_helm_accepts_its_commands(arguments: list[str]) -> None:
    from helm.benchmark.presentation.run_entry import RunEntry

    from flexgen_helm.runs.entries import check_run_spec_names

    args = HELM.build_parser().parse_args(arguments)
    check_run_spec_names([RunEntry(entry) for entry in args.run_entries])


def test_other_commands_are_accepted() -> None:
    from benchmarks.rivals.run import parse_flags
    from engine.planning.hardware_profile import HardwareProfile
    from flexgen_helm.commands.bench import bench_parser, workloads
    from flexgen_helm.commands.check import parse_check_flags
    from flexgen_helm.commands.compare import parse_compare_flags
    from flexgen_helm.commands.complete import complete_parser
    from flexgen_helm.commands.completion.serve import serve_parser
    from flexgen_helm.commands.plan import names_shape, parse_plan_flags, plan_parser
    from flexgen_helm.commands.register import register_parser
    from flexgen_helm.commands.report import parse_report_flags
    from flexgen_helm.commands.sweep import parse_sweep_flags
    from flexgen_helm.commands.verify import parse_verify_flags
    from flexgen_helm.planning.dummy import shape_config
    from flexgen_helm.planning.roofline import Workload
    from flexgen_helm.run import COMMANDS
    from flexgen_helm.runs.entries import read_entries
    from flexgen_helm.runs.flags import checked_policy, names_entries, policy_from_flags

    for arguments in commands_of("flexgen-helm"):
        assert arguments[0] in COMMANDS
    for arguments in commands_of("flexgen-helm", "bench"):
        args = bench_parser().parse_args(arguments)
        assert workloads(args.rows, args.curve)
        shape_config(args.shape)
    for arguments in commands_of("flexgen-helm", "complete"):
        policy_from_flags(complete_parser().parse_args(arguments))
    for arguments in commands_of("flexgen-helm", "serve"):
        policy_from_flags(serve_parser().parse_args(arguments))
    for arguments in commands_of("flexgen-helm", "plan"):
        if not names_shape(arguments):
            assert names_entries(parse_plan_flags(arguments))
            continue
        plan_args = plan_parser().parse_args(arguments)
        shape_config(plan_args.shape)
        Workload.parse(plan_args.work)
        if plan_args.hardware is not None:
            HardwareProfile.load(plan_args.hardware)
    for arguments in commands_of("flexgen-helm", "check"):
        parse_check_flags(arguments)
    for arguments in commands_of("flexgen-helm", "verify"):
        assert read_entries(parse_verify_flags(arguments))
    for arguments in commands_of("flexgen-helm", "report"):
        parse_report_flags(arguments)
    for arguments in commands_of("flexgen-helm", "compare"):
        parse_compare_flags(arguments)
    for arguments in commands_of("flexgen-helm", "sweep"):
        sweep_args = parse_sweep_flags(arguments)
        policy_from_flags(sweep_args)
        assert read_entries(sweep_args)
    for arguments in commands_of("flexgen-helm", "register"):
        checked_policy(register_parser().parse_args(arguments).policy)
    for arguments in commands_of("python", "-m", "benchmarks.rivals.run"):
        shape_config(parse_flags(arguments).shape)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {arguments[0] for arguments in commands_of("make")} <= targets


def test_every_flag_in_the_text_exists() -> None:
    from flexgen_helm.commands.complete import complete_parser
    from flexgen_helm.commands.sweep import sweep_parser

    known = " ".join(
        flag
        for parser in (sweep_parser(), complete_parser(), HELM.build_parser())
        for action in parser._actions
        for flag in action.option_strings
    )
    commands = ROOT / "flexgen_helm" / "commands"
    known += "".join(
        (commands / f"{name}.py").read_text()
        for name in ("register", "doctor", "report", "compare", "plan", "completion/serve")
    )
    known += "".join(script.read_text() for script in (ROOT / "benchmarks").glob("*.py"))
    known += Path(find_spec("lm_eval._cli.run").origin).read_text()  # type: ignore[union-attr, arg-type]
    text = re.sub(r"```.*?```", "", GUIDES, flags=re.DOTALL)
    others = {
        "--description",
        "--now",
        "--signal",
        "--summarizer-class-name",
    }  # FlexGen, systemd, Slurm, helm-summarize
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - others
    assert flags
    assert [flag for flag in flags if flag not in known] == []


def test_the_policy_shown_is_one_and_shows_every_key() -> None:
    shown = [yaml.safe_load(block) for block in blocks("yaml") if block.startswith("gpu-batch-size")]
    for each in shown:
        Policy.from_mapping(each)
    policy = max(shown, key=len)
    known = {field.name.replace("_", "-") for field in fields(Policy)}
    assert set(policy) == known - {"weights", "kv-cache", "activations"} | {"percent"}


def test_every_shipped_policy_and_file_of_entries_is_named() -> None:
    shipped = {file.stem for folder in policy_directories() for file in folder.glob("*.yaml")}
    shipped |= {file.stem for file in (ROOT / "run_specs").glob("*.conf")}
    assert [name for name in shipped if f"`{name}`" not in GUIDES] == []


def test_the_deployment_shown_is_one() -> None:
    import cattrs
    from helm.benchmark.model_deployment_registry import ModelDeployments
    from helm.common.object_spec import get_class_by_name

    shown = next(block for block in blocks("yaml") if block.startswith("model_deployments"))
    deployment = cattrs.structure(yaml.safe_load(shown), ModelDeployments).model_deployments[0]
    assert get_class_by_name(deployment.client_spec.class_name).__name__ == "FlexGenClient"
    Policy.load(deployment.client_spec.args["policy"])


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = models.save_model(tmp_path_factory.mktemp("llama"), "llama")
    return directory


@pytest.mark.parametrize("block", blocks("python"))
def test_the_python_shown_runs(
    block: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Word by word, but for the model, which is a tiny one."""
    load = Engine.from_pretrained

    def load_tiny(model: str, policy: Any = "auto") -> Engine:
        assert model == "facebook/opt-30b"
        Policy.load(policy)
        return load(str(tiny_model), policy={"device": "cpu"})

    monkeypatch.setattr(Engine, "from_pretrained", load_tiny)
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", TEXTS[page])
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_index_of_the_guides_names_them_all() -> None:
    index = ROOT / "docs" / "README.md"
    assert set(re.findall(r"\]\(([\w.-]+\.md)\)", TEXTS[index])) >= {page.name for page in PAGES[1:]} - {index.name}


def test_the_readme_is_short() -> None:
    assert len(TEXTS[ROOT / "README.md"].splitlines()) <= 200


def test_the_demo_ends_with_a_command_that_works() -> None:
    from flexgen_helm.runs import demo
    from flexgen_helm.runs.flags import parse_run_flags, policy_from_flags

    words = shlex.split(demo.NEXT.splitlines()[-1])
    assert words[:3] == ["python", "-m", "flexgen_helm.run"]
    assert policy_from_flags(parse_run_flags(words[3:])) == "opt-30b-t4"


def test_the_changelog_is_in_the_agreed_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[0] == "[Unreleased]"
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= {
        *("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"),
    }


def test_nothing_names_the_machine_it_was_made_on() -> None:
    pattern = re.compile(r"/work/|/tmp/|\.\./shared|issue \d")
    files = [
        path
        for folder in ("flexgen_helm", "engine", "configs", "run_specs", "docs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".yaml", ".conf")
    ]
    files += [ROOT / name for name in ("README.md", "CHANGELOG.md", "Makefile", "setup.cfg", "pyproject.toml")]
    assert len(files) > 30
    assert [str(path) for path in files if pattern.search(path.read_text(encoding="utf-8"))] == []


ARCHITECTURE = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
SOURCES = [file for package in ("engine", "flexgen_helm") for file in sorted((ROOT / package).rglob("*.py"))]
ROOM = re.compile(r"^\| (`\w+`|beside the rooms) \|[^|]*\|([^|]*)\|([^|]*)\|$", re.MULTILINE)
"""A row of a table of rooms: the room, what it imports, its files."""


@cache
def defined() -> set[str]:
    """What the packages define: classes, functions and constants by their names, by `Class.name` and `module.name`."""
    names: set[str] = set()
    for file in SOURCES:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            own = [target.id for target in targets if isinstance(target, ast.Name)]
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                own.append(node.name)
            names |= {*own, *(f"{file.stem}.{name}" for name in own)}
            if isinstance(node, ast.ClassDef):
                methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
                names |= {*methods, *(f"{node.name}.{method}" for method in methods)}
                names |= {f"{file.stem}.{node.name}.{method}" for method in methods}
    return names


def named_in_the_architecture() -> list[str]:
    text = re.sub(r"```.*?```", "", ROOM.sub("", ARCHITECTURE), flags=re.DOTALL)
    return sorted(set(re.findall(r"`([^`\n]+)`", text)) | set(re.findall(r"docs/adr/\d{4}", text)))


def exists(name: str) -> bool:
    """Whether what the architecture names is there: a path, a name of ours or of transformers', a word of the code."""
    if name.startswith("docs/adr/"):
        return len(list((ROOT / "docs" / "adr").glob(f"{name[-4:]}-*.md"))) == 1
    if "/" in name:
        return (ROOT / name).exists()
    if name.startswith("transformers."):
        return hasattr(import_module("transformers"), name.partition(".")[2])
    if name[0].isupper():
        return name in defined() or hasattr(import_module("transformers"), name)
    if "." in name:
        return name in defined()
    return " " in name or any(name in file.read_text(encoding="utf-8") for file in SOURCES)


@pytest.mark.parametrize("name", named_in_the_architecture())
def test_what_the_architecture_names_exists(name: str) -> None:
    assert exists(name), f"docs/ARCHITECTURE.md names {name}, which is not there"


def test_the_drawing_of_a_sweep_calls_what_there_is() -> None:
    drawing = next(block for block in re.findall(r"```\n(.*?)```", ARCHITECTURE, re.DOTALL) if "next_sweep" in block)
    called = re.findall(r"\w+\.(\w+)(?=\(| →|$)", drawing, re.MULTILINE)
    assert len(called) >= 8
    assert [name for name in called if name not in defined()] == []


@pytest.mark.parametrize("package", ["engine", "flexgen_helm"])
def test_the_architecture_tells_of_every_room_what_it_holds_and_imports(package: str) -> None:
    section = ARCHITECTURE.partition(f"### `{package}/`")[2].partition("\n## ")[0].partition("\n### ")[0]
    rows = {room.strip("`"): (imports, files) for room, imports, files in ROOM.findall(section)}
    rooms = {file.parent.name for file in (ROOT / package).glob("*/__init__.py")}
    assert rows.keys() - {"beside the rooms"} == rooms
    for room, (imports, files) in rows.items():
        folder = ROOT / package / ("" if room == "beside the rooms" else room)
        found = folder.glob("*.py") if room == "beside the rooms" else folder.rglob("*.py")
        held = {file.relative_to(folder).with_suffix("").as_posix() for file in found if file.name != "__init__.py"}
        assert set(re.findall(r"`([\w/]+)`", files)) == held, f"docs/ARCHITECTURE.md on {package}/{room}"
        if imports.strip() == "every room":
            continue
        told = set(re.findall(r"`(\w+)`", imports))
        for file in folder.rglob("*.py"):
            used = re.findall(
                rf"^\s*(?:from|import) {package}\.(\w+)\.", file.read_text(encoding="utf-8"), re.MULTILINE
            )
            assert set(used) & rooms - {room} <= told, f"{file.relative_to(ROOT)} imports more than the page says"


def test_the_map_of_the_tests_names_every_folder_and_only_what_is_there() -> None:
    tests = ROOT / "tests"
    table, _, text = (tests / "README.md").read_text(encoding="utf-8").partition("Files that are no tests")
    named = set(re.findall(r"`([\w/]+)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE))))
    folders = {file.parent.relative_to(tests).as_posix() for file in tests.rglob("test_*.py")}
    assert {name.rstrip("/") for name in named - {"tests/"}} == folders - {"."}
    files = re.findall(r"`([\w/]+\.py)`", text)
    assert files
    assert [name for name in files if not (tests / name).exists()] == []
