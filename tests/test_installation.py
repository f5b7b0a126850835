"""Protects: what is built from the sources and installed where nothing of them is has the first minutes' commands."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
BUILD_SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
ALONE = {"PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
"""pip installs what it is given, and what that needs is there (the last one means that nothing is isolated)."""

Run = Callable[..., str]
pytestmark = pytest.mark.slow


def new_environment(folder: Path) -> Path:
    """A virtual environment that sees the packages of this one, but for what is installed from this checkout."""
    venv.create(folder, with_pip=False, symlinks=True)
    (own,) = folder.glob("lib/python3*/site-packages")
    (own / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # whose own .pth files are not read
    return folder / "bin"


def clean(**more: str) -> dict[str, str]:
    """This environment without what leads to the checkout."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def done(command: list[str | Path], folder: Path, environment: dict[str, str]) -> str:
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
    return result.stdout


def copied(names: list[str], target: Path) -> None:
    for name in names:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, place)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment with the wheel that was built from the source distribution."""
    folder = tmp_path_factory.mktemp("installed")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    copied([name for name in tracked.stdout.splitlines() if (ROOT / name).is_file()], folder / "source")
    built = done([sys.executable, "-c", BUILD_SDIST, folder], folder / "source", clean()).splitlines()[-1]
    pip: list[str | Path] = [sys.executable, "-m", "pip"]
    done([*pip, "wheel", "--wheel-dir", folder, folder / built], folder, clean(**ALONE))
    commands = new_environment(folder / "environment")
    (wheel,) = folder.glob("*.whl")
    done([*pip, "--python", commands / "python", "install", wheel], folder, clean(**ALONE))
    return commands


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Run:
    """Run `flexgen-helm` of that environment in an empty directory."""
    return lambda *words, **more: done([installed / "flexgen-helm", *words], tmp_path, clean(**more))


def test_it_is_the_installed_package_that_is_imported(installed: Path, tmp_path: Path) -> None:
    program = "import engine, flexgen_helm; print(engine.__file__, flexgen_helm.__file__)"
    files = done([installed / "python", "-c", program], tmp_path, clean()).split()
    assert all(Path(file).is_relative_to(installed.parent) for file in files)


def test_doctor_finds_nothing_broken(run: Run) -> None:
    lines = run("doctor").splitlines()
    assert not [line for line in lines if line.startswith("broken")]
    assert any(line.startswith("ok       helm entry point") for line in lines)


def test_check_plan_and_completion(run: Run, tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=2, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert run("check", tmp_path / "config.json").splitlines()[-1].startswith("EQUAL")
    run("plan", "--shape", "opt-30b", "--hardware", "t4", "--write", tmp_path / "policy.yaml")
    assert yaml.safe_load((tmp_path / "policy.yaml").read_text())["gpu-memory"]
    assert "flexgen-helm" in run("completion", "bash")


def test_the_demo(run: Run) -> None:
    """From the package registry, or from what an earlier demo fetched."""
    shown = run("demo")
    assert "In plain words, SmolLM2-135M-Instruct knew" in shown
    assert "of 152" in shown


def instructions(text: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions and what they say, in order."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.partition(" ")[2]) for line in lines if line.strip()]


def test_what_the_container_copies_is_enough_to_install_it(tmp_path: Path) -> None:
    """Its lines that install, run in an environment of its own; a container cannot be built by a test."""
    commands = new_environment(tmp_path / "environment")
    steps = instructions((ROOT / "Dockerfile").read_text())
    for name, what in steps:
        if name == "COPY":
            *sources, _ = shlex.split(what)
            copied([source.removeprefix("./") for source in sources], tmp_path / "source")
    installing = [shlex.split(what) for name, what in steps if name == "RUN" and " pip " in what]
    assert installing
    for python, *words in installing:
        assert (python, words[:2]) == ("python", ["-m", "pip"])
        command = [sys.executable, "-m", "pip", "--python", commands / "python", *words[2:]]
        done(command, tmp_path / "source", clean(**ALONE))
    (entry,) = [yaml.safe_load(what) for name, what in steps if name == "ENTRYPOINT"]
    (default,) = [yaml.safe_load(what) for name, what in steps if name == "CMD"]
    shown = done([commands / entry[0], *entry[1:], *default], tmp_path, clean())
    assert "ok       engine package" in shown
