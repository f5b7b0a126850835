"""Protects: the rooms of both packages: what each may import, how large they are, and what stays light to load."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "engine": (
        "memory",
        "kernels",
        "planning",
        "measuring",
        "schedule",
        "text",
        "batch",
        "checkpoint",
        "cache",
        "model",
        "weights",
        "stages",
        "drafting",
        "verification",
        "asking",
        "workers",
        "hosts",
    ),
    "flexgen_helm": (
        "terminal",
        "planning",
        "pictures",
        "checking",
        "workers",
        "helm",
        "data_wrangling",
        "judging",
        "runs",
        "sweeps",
        "suites",
        "fidelity",
        "reports",
        "adapters",
        "commands",
    ),
}
"""In this order: a room imports only rooms before it, and the ground. The files beside the rooms import all of them."""
GROUND = {
    "engine": ("errors", "reading", "logit_rules", "thinking", "job", "member", "policy"),
    "flexgen_helm": (),
}
"""Files beside the rooms that every room may import; they import no room but the first."""
LIGHT_ROOMS = ("engine.planning", "engine.schedule")
LIGHT_FILES = (
    "engine",
    "engine.errors",
    "engine.job",
    "engine.policy",
    "engine.reading",
    "engine.memory.disk.file",
    "engine.memory.free_rows",
    "engine.memory.layout",
    "engine.memory.paths",
    "engine.memory.tiers",
    "engine.measuring.disk_rates",
    "engine.checkpoint.description",
    "engine.checkpoint.tensors",
    "engine.checkpoint.identity.result",
)
HEAVY = {"torch", "transformers", "helm", "flexgen_helm", "safetensors", "numpy"}
MOST_FILES, MOST_LINES = 15, 300


@cache
def modules() -> dict[str, Path]:
    """Every module of both packages by its dotted name."""
    found = {}
    for package in ROOMS:
        for file in sorted((ROOT / package).glob("**/*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def imported(module: str) -> frozenset[str]:
    """The modules that a module imports, wherever in it and also for annotations only."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            base = node.module or ""
            names |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base for alias in node.names}
    return frozenset(names - {module})


def room_of(module: str) -> str | None:
    """The room of a module of ours; None for a file beside the rooms."""
    package, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    return room if room in ROOMS[package] else None


def wrong_imports(module: str) -> list[str]:
    """The imports of a module that the order of the rooms forbids, in words."""
    package, room = module.partition(".")[0], room_of(module)
    rooms = ROOMS[package]
    if room is None and module.partition(".")[2] not in GROUND[package]:
        return []
    allowed = rooms[: rooms.index(room) + 1] if room is not None else rooms[:1]
    wrong = []
    for name in imported(module):
        if name.partition(".")[0] != package or name == package:
            continue
        other = room_of(name)
        if other is None and name.partition(".")[2] not in GROUND[package]:
            wrong.append(f"{module} imports {name}, which is beside the rooms")
        if other is not None and other not in allowed:
            wrong.append(f"{module} imports {name}: {other} comes after {room}")
    return wrong


def test_a_room_imports_only_rooms_before_it() -> None:
    assert [wrong for module in modules() for wrong in wrong_imports(module)] == []


def test_the_engine_knows_nothing_of_helm() -> None:
    engine = [module for module in modules() if module.partition(".")[0] == "engine"]
    assert len(engine) > 100
    knowing = [(module, name) for module in engine for name in imported(module)]
    assert [pair for pair in knowing if pair[1].partition(".")[0] in ("helm", "flexgen_helm")] == []


def test_no_module_imports_itself_in_a_circle() -> None:
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in finished:
            for name in imported(module):
                if name in modules() and name not in ROOMS:  # a package's own `__init__` imports lazily
                    visit(name, (*path, module))
            finished.add(module)

    for module in modules():
        if module not in ROOMS:
            visit(module, ())


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_say_what_they_are_for_and_stay_small(package: str) -> None:
    for room in ROOMS[package]:
        text = ast.get_docstring(ast.parse((ROOT / package / room / "__init__.py").read_text(encoding="utf-8")))
        assert text is not None, f"{package}/{room} does not say what it is for"
        assert len(text.splitlines()) >= 2, f"{package}/{room} does not say what it is for and what it may import"
    for folder in {file.parent for name, file in modules().items() if name.partition(".")[0] == package}:
        files = list(folder.glob("*.py"))
        assert len(files) <= MOST_FILES, f"{folder.relative_to(ROOT)} holds {len(files)} files"
        for file in files:
            lines = len(file.read_text(encoding="utf-8").splitlines())
            assert lines <= MOST_LINES, f"{file.relative_to(ROOT)} has {lines} lines"


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`."""
    report = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    found = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return set(found.stdout.split())


def test_the_light_half_of_the_engine_loads_nothing_heavy() -> None:
    names = [name for name in modules() if name.startswith(LIGHT_ROOMS) or name in LIGHT_FILES]
    assert set(LIGHT_FILES) <= set(names)
    loaded = loaded_after(
        "import sys\n"
        + "".join(f"import {name}\nassert not {HEAVY!r} & sys.modules.keys(), {name!r}\n" for name in names)
    )
    assert loaded & HEAVY == set()


def test_reading_a_policy_and_making_a_plan_load_nothing_heavy() -> None:
    code = """
from engine import Completion, EngineError, Job, Policy, Sampling
from engine.planning.hardware import Memory
from engine.planning.model_shape import ModelShape
from engine.planning.planner import make_plan
policy = Policy.load("opt-30b-t4")
shape = ModelShape(unit_bytes=(10**9,) * 48, embedding_bytes=0, outer_bytes=0, cache_row_bytes=10**6,
                   cache_layer_row_bytes=10**5, hidden_row_bytes=10**4, work_row_bytes=10**5)
make_plan(shape, policy, Memory(device=15 * 10**9, host=10**12, disk=0), on_cpu=False)
"""
    assert loaded_after(code) & HEAVY == set()


def test_the_engine_comes_when_it_is_asked_for() -> None:
    loaded = loaded_after("from engine import Engine; assert Engine.__module__ == 'engine.engine'")
    assert {"torch", "transformers"} <= loaded
    assert loaded & {"helm", "flexgen_helm"} == set()


def test_an_unknown_name_is_an_attribute_error() -> None:
    import engine

    with pytest.raises(AttributeError, match="Motor"):
        engine.Motor  # noqa: B018
    assert engine.__distribution__ == "flexgen-helm"
    for name in engine.__all__:
        assert getattr(engine, name)
