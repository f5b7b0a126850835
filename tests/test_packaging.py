"""Protects: the built wheel holds every package and data file, and its entry points lead somewhere."""

from __future__ import annotations

import configparser
import importlib
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, entry_points, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    built = subprocess.run([*command, str(folder), str(source)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_every_module_and_data_file_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in ("engine", "flexgen_helm")
        for path in ROOT.glob(f"{package}/**/*.py")
    }
    for pattern in ("configs/**/*.yaml", "configs/**/*.json", "run_specs/**/*.conf"):
        expected |= {f"flexgen_helm/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob(pattern)}
    assert len(expected) > 10
    assert expected <= set(wheel.namelist())


def test_the_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name}
    assert tops == {"engine", "flexgen_helm"}


def test_the_wheel_holds_the_licence(wheel: zipfile.ZipFile) -> None:
    name = next(name for name in wheel.namelist() if name.endswith("LICENSE"))
    assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()


def test_entry_points_of_the_wheel(wheel: zipfile.ZipFile) -> None:
    points = configparser.ConfigParser()
    points.read_string(
        wheel.read(next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))).decode()
    )
    assert dict(points["helm"]) == {"flexgen_helm": "flexgen_helm.plugin"}
    assert dict(points["inspect_ai"]) == {"flexgen_helm": "flexgen_helm.inspect_adapter"}
    assert dict(points["console_scripts"]) == {"flexgen-helm": "flexgen_helm.run:main"}


def test_helm_finds_the_installed_plugin() -> None:
    plugins = [point for point in entry_points(group="helm") if point.name == "flexgen_helm"]
    assert plugins
    assert plugins[0].load() is importlib.import_module("flexgen_helm.plugin")


def test_what_is_shipped_is_found_beside_the_installed_package(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    program = (
        "from engine.policy import Policy; from flexgen_helm.runs.entries import conf_path; import engine;"
        "print(engine.__file__); print(Policy.load('opt-30b-t4').gpu_batch_size); print(conf_path('quick'));"
        "from engine.planning.hardware_profile import HardwareProfile; print(HardwareProfile.load('t4').device_name)"
    )
    found = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {[str(tmp_path), *sys.path]!r}; {program}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == [
        str(tmp_path / "engine" / "__init__.py"),
        "48",
        str(tmp_path / "flexgen_helm" / "run_specs" / "quick.conf"),
        "Tesla T4",
    ]


@pytest.mark.parametrize(
    "module", [f"flexgen_helm{name}" for name in ("", ".plugin", ".run", ".commands.doctor", ".commands.profiling")]
)
def test_importing_it_loads_neither_torch_nor_helm_run(module: str) -> None:
    program = f"import sys, {module}; print([name for name in ('torch', 'helm.benchmark.run') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[]"


def test_constraints_pin_all_that_tests_and_checks_install() -> None:
    """Through what is needed by what is needed, as far as this machine's environment has it."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(name): version
        for name, is_pin, version in (line.partition("==") for line in lines if not line.startswith("#"))
        if is_pin
    }
    extras = setup["options.extras_require"]
    named = [setup["options"]["install_requires"], extras["test"], extras["dev"]]
    left = [Requirement(line) for text in named for line in text.splitlines() if line.strip()]
    seen: set[tuple[str, frozenset[str]]] = set()
    while left:
        needed = left.pop()
        key = (canonicalize_name(needed.name), frozenset(needed.extras))
        if key in seen:
            continue
        seen.add(key)
        assert key[0] in pins, needed
        assert needed.specifier.contains(pins[key[0]], prereleases=True), (needed, pins[key[0]])
        try:
            further = requires(needed.name) or []
        except PackageNotFoundError:
            continue
        for each in map(Requirement, further):
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in needed.extras or {""}):
                left.append(each)
    assert len(seen) > 50
