"""Protects: damaged or changing files, and concurrent commands, are detected or harmless."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from commands import SEEDS, Command, Complete, Sweep

pytestmark = pytest.mark.faults
MakeSweep = Callable[..., Sweep]
READ_AGAIN = {
    "cache": "prod_env/cache/*.sqlite",
    "entries": "prod_env/*.yaml",
    "kept": "home/flexgen-helm/weights/*/*",
    "digests": "home/flexgen-helm/digests/*",
    "runs": "benchmark_output/runs/s/*/*",
    "records": "benchmark_output/runs/s/*.*",
}


def damage(file: Path, dice: random.Random) -> str:
    """Damage a file; says how."""
    content, how = bytearray(file.read_bytes()), dice.choice(["flipped", "truncated", "zeroed", "emptied", "garbage"])
    at = dice.randrange(max(1, len(content)))
    if how == "flipped" and content:
        content[at] ^= 1 << dice.randrange(8)
    elif how == "truncated":
        del content[at:]
    elif how == "zeroed":
        content[at : at + 512] = bytes(len(content[at : at + 512]))
    else:
        content = bytearray(dice.randbytes(len(content)) if how == "garbage" else b"")
    file.write_bytes(content)
    return f"{file}: {how} at {at}"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", READ_AGAIN)
def test_a_damaged_file(kind: str, seed: int, make_sweep: MakeSweep, undisturbed_sweep: Sweep) -> None:
    sweep = make_sweep()
    sweep.take_files_of(undisturbed_sweep)
    dice = random.Random(f"{kind} {seed}")
    how = damage(dice.choice(sorted(file for file in sweep.folder.glob(READ_AGAIN[kind]) if file.is_file())), dice)
    print(how)
    for command in (["report", "s"], ["compare", "s", "s"]):
        Command(sweep.folder, command).run().check_told(0, 1, 2)
    sweep.run("--skip-completed-runs").check_clean(0, 1, 2)
    ended = sweep.run()
    if kind == "entries" and ended.code:  # a user's own file: refused, or as it says
        ended.check_clean(2)
        return
    ended.check_clean(0)
    if kind != "entries":
        sweep.check_like(undisturbed_sweep, aside=True)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("how", ["written", "replaced", "truncated", "removed"])
def test_a_models_file_that_changes(
    how: str, seed: int, tiny_llama: Path, tmp_path: Path, helm_data: Path, warm_for_package: None
) -> None:
    """Right answers, or none, and none that stay when the file is as it was."""
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    flags = ("--percent", "50", "0", "100", "0", "100", "0", "--offload-dir", "offload")
    sweeps = [Sweep(tmp_path / name, helm_data, model, *flags) for name in ("here", "undisturbed")]
    weights, dice = model / "model.safetensors", random.Random(f"{how} {seed}")
    before = weights.read_bytes()
    time.sleep(2)  # as long as files count as being written
    process = sweeps[0].begin()
    delivered = sweeps[0].folder / "delivered"
    while process.poll() is None and not delivered.exists():
        time.sleep(0.01)
    time.sleep(dice.uniform(0, 0.5))
    changed = bytearray(before)
    changed[len(before) // 2 :] = dice.randbytes(len(before) - len(before) // 2)
    if how == "written":
        with weights.open("r+b") as file:
            file.write(changed)
    elif how == "truncated":
        with weights.open("r+b") as file:
            file.truncate(len(before) // 2)
    else:
        weights.unlink()
        if how == "replaced":
            weights.write_bytes(changed)
    said = process.communicate(timeout=300)
    assert process.returncode in (0, 1, 2), said
    assert "Traceback" not in "".join(said), said
    weights.write_bytes(before)
    time.sleep(2)
    for sweep in sweeps:
        sweep.run().check_clean(0)
    sweeps[0].check_like(sweeps[1])


def test_two_sweeps_of_one_suite(make_sweep: MakeSweep, undisturbed_sweep: Sweep) -> None:
    sweep = make_sweep()
    processes = [sweep.begin() for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2], said
    assert sum("another sweep is running in suite s" in each for each in said) == 1
    sweep.check_like(undisturbed_sweep)


@pytest.mark.parametrize("number", [2, 4])
def test_sweeps_that_share_all_but_the_suite(number: int, make_sweep: MakeSweep, undisturbed_sweep: Sweep) -> None:
    """One cache, one offload-dir, one directory of kept weights and digests, one output directory."""
    sweep = make_sweep()
    processes = [sweep.begin("--suite", f"s{each}" if each else "s") for each in range(number)]
    said = [process.communicate(timeout=600) for process in processes]
    assert {process.returncode for process in processes} == {0}, said
    for each in range(1, number):
        shutil.rmtree(sweep.suite.parent / f"s{each}")
    sweep.run("--skip-completed-runs").check_clean(0)
    sweep.check_like(undisturbed_sweep)


def test_two_completions_into_one_file(make_complete: Callable[..., Complete], undisturbed_complete: Complete) -> None:
    complete = make_complete()
    processes = [complete.begin() for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2], said
    assert sum("another process writes" in each for each in said) == 1
    assert complete.answers() == undisturbed_complete.answers()


def test_models_that_are_registered_at_once(tiny_llama: Path, tmp_path: Path, warm_for_package: None) -> None:
    models = [shutil.copytree(tiny_llama, tmp_path / f"model{each}") for each in range(6)]
    commands = [Command(tmp_path / "here", ["register", str(model)]) for model in models]
    processes = [command.begin() for command in commands]
    said = [process.communicate(timeout=300) for process in processes]
    assert {process.returncode for process in processes} == {0}, said
    for file, key in (("model_deployments", "model_deployments"), ("model_metadata", "models")):
        found = yaml.safe_load((tmp_path / f"here/prod_env/{file}.yaml").read_text())[key]
        assert len({entry["name"] for entry in found}) == 6, json.dumps(found)
