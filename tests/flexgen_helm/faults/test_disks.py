"""Protects: full disks and I/O errors end a command in a one-line error; it can be resumed once they are repaired."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import SEEDS, Complete, Sweep
from disks import KINDS, small_disk

pytestmark = pytest.mark.faults
MakeSweep = Callable[..., Sweep]
PLACES = {
    "runs": "benchmark_output/runs",
    "cache": "prod_env",
    "offload": "offload",
    "kept": "home",
    "log": "log",
    "temporary": "temporary",
}
"""What a sweep writes, by its directory."""
ROOM_KB = (0, 4, 8, 16, 40, 100, 200, 400, 700)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sweep_on_a_full_disk(
    kind: str, place: str, seed: int, make_sweep: MakeSweep, undisturbed_sweep: Sweep
) -> None:
    sweep = make_sweep()
    more = ("--json-log", "log/events.jsonl") if place == "log" else ()
    room = random.Random(f"{kind} {place} {seed}").choice(ROOM_KB) << 10
    environment = {"TMPDIR": str(sweep.folder / "temporary")} if place == "temporary" else {}
    with small_disk(sweep.folder / PLACES[place], kind, room) as disk:
        sweep.run(*more, **environment).check_clean(0, 1, 2)
        disk.make_room()
        sweep.run(**environment).check_clean(0)
        (sweep.folder / "log/events.jsonl").unlink(missing_ok=True)
        sweep.check_like(undisturbed_sweep)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_completions_on_a_full_disk(
    kind: str, seed: int, make_complete: Callable[..., Complete], undisturbed_complete: Complete
) -> None:
    complete = make_complete()
    room = random.Random(f"{kind} {seed}").choice((0, 4, 8)) << 10
    with small_disk(complete.folder / "here", kind, room) as disk:
        answers = ("-o", "here/answers.jsonl")
        complete.run(*answers).check_clean(0, 1, 2)
        disk.make_room()
        complete.run(*answers).check_clean(0)
        assert (complete.folder / "here/answers.jsonl").read_text().count("\n") == Complete.NUM
        shutil.copyfile(complete.folder / "here/answers.jsonl", complete.folder / "answers.jsonl")
    assert complete.answers() == undisturbed_complete.answers()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("place", ["benchmark_output/runs", "prod_env", "offload", "home"])
@pytest.mark.parametrize("kind", ["full", "bad-write"])
def test_a_write_that_fails(
    kind: str, place: str, seed: int, failing_io: None, make_sweep: MakeSweep, undisturbed_sweep: Sweep
) -> None:
    """From some write on, all that follow: whichever that is."""
    sweep = make_sweep()
    first = round(2 ** random.Random(f"{kind} {place} {seed}").uniform(0, 7))
    sweep.run(FAULT_IO=f"{kind}:{first}:{sweep.folder / place}").check_clean(0, 1, 2)
    sweep.run().check_clean(0)
    sweep.check_like(undisturbed_sweep)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("place", ["benchmark_output/runs", "prod_env", "offload", "home", "model.safetensors"])
@pytest.mark.parametrize("kind", ["short-read", "bad-read"])
def test_a_read_that_fails(
    kind: str,
    place: str,
    seed: int,
    failing_io: None,
    tiny_llama: Path,
    make_sweep: MakeSweep,
    undisturbed_sweep: Sweep,
) -> None:
    sweep = make_sweep()
    sweep.take_files_of(undisturbed_sweep)
    first = round(2 ** random.Random(f"{kind} {place} {seed}").uniform(0, 6))
    part = tiny_llama / place if place == "model.safetensors" else sweep.folder / place
    more = ["--skip-completed-runs"] * (seed % 2)
    ended = sweep.run(*more, FAULT_IO=f"{kind}:{first}:{part}")
    ended.check_clean(*((0,) if kind == "short-read" else (0, 1, 2)))
    sweep.run().check_clean(0)
    sweep.check_like(undisturbed_sweep)
