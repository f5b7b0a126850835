"""Protects: the engine's pure half loads neither torch nor transformers, and nothing in the engine knows HELM."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PURE = [
    "engine",
    "engine.errors",
    "engine.job",
    "engine.policy",
    "engine.memory.layout",
    "engine.measuring.disk_rates",
    "engine.planning.hardware",
    "engine.planning.hardware_profile",
    "engine.planning.planner",
    "engine.schedule.sequence",
    "engine.schedule.prefix",
    "engine.schedule.scheduler",
    "engine.memory.free_rows",
    "engine.checkpoint.files",
    "engine.checkpoint.identity",
]
HEAVY = {"torch", "transformers", "helm", "flexgen_helm", "safetensors", "numpy"}


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`."""
    report = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    found = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return set(found.stdout.split())


@pytest.mark.parametrize("module", PURE)
def test_the_pure_half_loads_nothing_heavy(module: str) -> None:
    assert loaded_after(f"import {module}") & HEAVY == set()


def test_reading_a_policy_and_making_a_plan_load_nothing_heavy() -> None:
    code = """
from engine import Completion, EngineError, Job, Policy, Sampling
from engine.planning.hardware import Memory
from engine.planning.planner import ModelShape, make_plan
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


def imported(file: Path) -> set[str]:
    """Top-level names of everything that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("file", sorted((ROOT / "engine").glob("**/*.py")), ids=lambda file: file.name)
def test_no_file_of_the_engine_knows_helm(file: Path) -> None:
    assert imported(file) & {"helm", "flexgen_helm"} == set()
