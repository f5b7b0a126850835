"""Engines of several processes that share the weights: they run the same jobs, one case after the other."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine import Completion, Engine, Job
from engine.member import Member
from engine.memory.tiers import Memory

MEMORY = Memory(device=1 << 30, host=8 << 30, disk=1 << 30, shared=True)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What engines are opened with, and what they run."""

    model: str
    policy: dict[str, Any]
    jobs: list[list[Job]]
    """Of each member."""
    gather: bool = False
    memory: Memory = MEMORY
    devices: tuple[str, ...] = ()
    """Of each member, where the policy's is not for all."""


@dataclass(kw_only=True)
class Outcome:
    """What became of a case in one process."""

    done: list[Completion] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)
    """Bytes on each tier."""
    digest: str | None = None
    error: str | None = None


def opened(case: Case, index: int, count: int, handle: int, meeting: Path) -> Engine:
    """The engine of one member."""
    member = Member(
        index=index,
        count=count,
        gather=case.gather,
        memory=case.memory,
        weights=None if case.gather else handle,
        meeting=str(meeting) if case.gather else None,
    )
    policy = {**case.policy, "device": case.devices[index]} if case.devices else case.policy
    return Engine.from_pretrained(case.model, policy=policy, member=member)


def run(
    cases: list[Case], count: int, folder: Path, before: str = "pass", *, may_die: bool = False
) -> list[list[Outcome]]:
    """The outcomes of `count` processes for each case; each of them executes `before` first.

    may_die: a process may end before its time, without outcomes.
    """
    with open(folder / "cases", "wb") as stream:
        pickle.dump(cases, stream)
    handles = [os.memfd_create(f"case {number}") for number in range(len(cases))]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]  # this file, and the engine
    code = f"import sys; sys.path[:0] = {paths}\nimport members\n{before}\nmembers.main(*map(eval, sys.argv[1:]))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(repr, (str(folder), count, handles, index))],
            pass_fds=handles,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    try:
        told = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for handle in handles:
            os.close(handle)
    assert may_die or [process.returncode for process in processes] == [0] * count, "\n".join(told)
    files = [folder / f"outcomes-{index}" for index in range(count)]
    found = [pickle.loads(file.read_bytes()) if file.exists() else [Outcome(error="died")] for file in files]
    return [list(each) for each in zip(*found, strict=True)]


def outcome_of(engine: Engine, jobs: Iterable[Job]) -> Outcome:
    """What an engine makes of jobs."""
    done = engine.run(jobs)
    engine.wait_until_loaded()
    held = {str(tier): size for tier, size in engine.placed_bytes().items()}
    return Outcome(done=done, held=held, digest=engine.weights_digest())


def main(directory: str, count: int, handles: list[int], index: int) -> None:
    """Run all cases as one member; each closes its engine when all have their answers."""
    torch.set_num_threads(1)
    folder, outcomes = Path(directory), []
    for number, (case, handle) in enumerate(zip(pickle.loads((folder / "cases").read_bytes()), handles, strict=True)):
        marks = [folder / f"done-{number}-{each}" for each in range(count)]
        try:
            with opened(case, index, count, handle, folder / f"meeting-{number}") as engine:
                outcomes.append(outcome_of(engine, case.jobs[index]))
                marks[index].touch()
                end = time.monotonic() + 60
                while not all(mark.exists() for mark in marks) and time.monotonic() < end:
                    time.sleep(0.01)
        except Exception as error:
            marks[index].touch()
            outcomes.append(Outcome(error=f"{type(error).__name__}: {error}"))
            break
    (folder / f"outcomes-{index}").write_bytes(pickle.dumps(outcomes))
    os._exit(0)  # as a worker does
