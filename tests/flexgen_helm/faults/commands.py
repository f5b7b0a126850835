"""Runs commands in directories of their own, disturbs them, and runs them again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from faulty_command import is_running, noted
from killed_sweeps import ENTRIES, kept
from sweeping import differences

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
ROUNDS = int(os.environ.get("FAULT_ROUNDS", "10"))
"""Of each kind of fault."""
SEEDS = range(int(os.environ.get("FAULT_SEED", "0")), int(os.environ.get("FAULT_SEED", "0")) + ROUNDS)
"""A fault is made of its seed alone, which stands at the end of its test's name."""
WAIT_S = 300
_OURS = ("workers", "delivered", "arrived", "scenarios", "prompts.jsonl", "filler")
"""What the tests write, or place, beside what the command does."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What a command has come to."""

    code: int
    told: str
    said: str

    def __str__(self) -> str:
        return f"exit code {self.code}\n{self.told[-2000:]}\n{self.said[-3000:]}"

    def check_clean(self, *codes: int) -> None:
        """It ended with one of `codes`, in one line where it is not 0, without a traceback."""
        self.check_told(*codes)
        if self.code:
            assert self.said.splitlines()[-1].startswith("flexgen-helm: error: "), self

    def check_told(self, *codes: int) -> None:
        """It ended with one of `codes`, without a traceback."""
        assert self.code in codes, self
        assert "Traceback" not in self.said + self.told, self
        assert "Exception ignored" not in self.said + self.told, self


class Command:
    """A command in a directory that has HELM's data."""

    def __init__(
        self, folder: Path, arguments: list[str], *, data: Path | None = None, places: Mapping[str, str] | None = None
    ) -> None:
        """`places` are variables of the environment beside $XDG_CACHE_HOME, which is in `folder` unless it is there."""
        self.folder, self.arguments = folder, arguments
        self.places = {"XDG_CACHE_HOME": str(folder / "home"), **(places or {})}
        folder.mkdir(parents=True, exist_ok=True)
        if data is not None:
            (folder / "benchmark_output").mkdir(exist_ok=True)
            with suppress(FileExistsError):
                (folder / "benchmark_output/scenarios").symlink_to(data / "scenarios")

    def begin(self, *more: str, fault: str = "", **environment: str) -> subprocess.Popen[str]:
        """Start it."""
        path = os.pathsep.join(map(str, (ROOT, HERE, HERE.parent, HERE.parents[1] / "engine")))
        given = {**os.environ, "PYTHONPATH": path, "FAULT": fault, **self.places, **environment}
        program = [sys.executable, str(HERE / "faulty_command.py"), *self.arguments, *more]
        return subprocess.Popen(
            program, cwd=self.folder, env=given, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def run(self, *more: str, fault: str = "", **environment: str) -> Ended:
        """Let it come to its end, and whatever it has started."""
        for name in ("arrived", "workers"):
            (self.folder / name).unlink(missing_ok=True)
        process = self.begin(*more, fault=fault, **environment)
        try:
            told, said = process.communicate(timeout=WAIT_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            told, said = process.communicate()
            raise AssertionError(f"it hangs\n{told[-2000:]}\n{said[-3000:]}") from None
        self.wait_for_others()
        return Ended(code=process.returncode, told=told, said=said)

    def wait_for_others(self) -> None:
        """Engines end with their command."""
        until = time.monotonic() + 30
        while left := [pid for pid in noted(self.folder / "workers") if is_running(pid)]:
            assert time.monotonic() < until, f"engines outlive their command: {left}"
            time.sleep(0.05)

    def take_compiled_of(self, other: Command) -> None:
        """Begin with the functions in C that another one has compiled, which takes longer than all else."""
        home = self.folder / "home/flexgen-helm"
        home.mkdir(parents=True)
        for file in (other.folder / "home/flexgen-helm").glob("host-*"):
            shutil.copy(file, home)

    @property
    def has_arrived(self) -> bool:
        """Whether the fault came before the command's end."""
        return (self.folder / "arrived").exists()

    def files(self) -> set[str]:
        """Names of all that it has left."""
        found = (path.relative_to(self.folder) for path in self.folder.rglob("*") if not path.is_dir())
        return {str(path) for path in found if path.parts[-1] not in _OURS}


class Sweep(Command):
    """A sweep of a few runs."""

    def __init__(self, folder: Path, data: Path, model: Path, *more: str, places: Mapping[str, str] | None = None):
        # Not the entry that processes of HELM's own side would have to be told to ask little of.
        common = ["-r", *ENTRIES[:3], "-m", "4", "--suite", "s", "--gpu-batch-size", "4", "--num-gpu-batches", "1"]
        super().__init__(folder, ["sweep", *common, "--model", str(model), *more], data=data, places=places)

    @property
    def suite(self) -> Path:
        """The directory of its runs."""
        return self.folder / "benchmark_output/runs/s"

    def take_files_of(self, other: Sweep) -> None:
        """Begin with what another one has left."""
        shutil.rmtree(self.folder)
        shutil.copytree(other.folder, self.folder, symlinks=True)

    def check_like(self, undisturbed: Sweep, *, aside: bool = False) -> None:
        """It has left what an undisturbed one leaves: the same files and answers, and nothing else.

        But for damaged files that were set `aside`, and what can be read of them.
        """
        found = differences(self.suite, undisturbed.suite)
        assert not found, found
        more = kept(self.folder) - kept(undisturbed.folder)
        assert more >= 0 if aside else more == 0, f"{more} answers more in the cache"
        own, whole = self.files(), undisturbed.files()
        left = {name for name in own - whole if not (aside and ".corrupt-" in name)}
        # A sweep that finds all answered loads nothing, and keeps nothing of it.
        missing = {name for name in whole - own if not name.startswith("home/")}
        assert not left | missing, f"left: {left}, missing: {missing}"
        assert json.loads((self.suite / "flexgen_sweep.json").read_text())["finished"]


class Complete(Command):
    """A `complete` of some prompts."""

    NUM = 40

    def __init__(self, folder: Path, model: Path, *more: str, places: Mapping[str, str] | None = None):
        super().__init__(
            folder,
            ["complete", "-i", "prompts.jsonl", "-o", "answers.jsonl", "--model", str(model), "--max-new-tokens", "6",
             "--gpu-batch-size", "4", "--num-gpu-batches", "1", *more],
            places=places,
        )  # fmt: skip
        lines = (json.dumps({"prompt": f"Question {number}: what is", "id": number}) for number in range(self.NUM))
        (folder / "prompts.jsonl").write_text("".join(f"{line}\n" for line in lines))

    def answers(self) -> list[tuple[int, str]]:
        """Index and text of each, in the file's order."""
        lines = (self.folder / "answers.jsonl").read_text().splitlines()
        return [(entry["index"], entry["completion"]) for entry in map(json.loads, lines)]
