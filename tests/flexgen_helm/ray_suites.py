"""Suites of made questions, swept on a Ray cluster of this machine or without one."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import uuid
from contextlib import closing
from pathlib import Path

from ray_processes import MARK
from scenario_files import table

ROOT = Path(__file__).resolve().parents[2]


def make_subjects(scenarios: Path, num_subjects: int, num_questions: int) -> None:
    """Write subjects of made questions, in the files of MMLU's download."""
    dice = random.Random(0)
    for subject in range(num_subjects):
        for split, count in (("dev", 5), ("val", 4), ("test", num_questions)):
            rows = []
            for _ in range(count):
                a, b = dice.randint(2, 99), dice.randint(2, 99)
                options = [a + b, a + b + 1, a + b - 2, a + b + 10]
                dice.shuffle(options)
                rows.append([f"What is {a} plus {b}?", *options, "ABCD"[options.index(a + b)]])
            table(scenarios / f"mmlu/data/{split}/subject{subject}_{split}.csv", rows)


class RaySuite:
    """A sweep of all subjects of a folder, in a folder of its own."""

    def __init__(self, folder: Path, scenarios: Path, model: Path, *more: str) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        (folder / "benchmark_output").mkdir(parents=True)
        (folder / "benchmark_output/scenarios").symlink_to(scenarios)
        subjects = len(list((scenarios / "mmlu/data/test").iterdir()))
        entries = [f"mmlu:subject=subject{number}" for number in range(subjects)]
        flags = ["--suite", "s", "-m", "1000", "--gpu-batch-size", "4", "--num-gpu-batches", "1", *more]
        program = [sys.executable, "-m", "flexgen_helm", "sweep"]
        self._command = [*program, "-r", *entries, "--model", str(model), *flags]

    @property
    def suite(self) -> Path:
        return self.folder / "benchmark_output/runs/s"

    def begin(self) -> subprocess.Popen[bytes]:
        """Start it, or let it go on; what it says is in the file "out"."""
        with (self.folder / "out").open("ab") as out:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), MARK: self.mark}
            return subprocess.Popen(self._command, cwd=self.folder, env=environment, stdout=out, stderr=out)

    def run(self) -> None:
        """Let it come to its end."""
        assert self.begin().wait(timeout=1800) == 0, self.said()

    def said(self) -> str:
        """The end of what it has said."""
        return (self.folder / "out").read_text(errors="replace")[-4000:]

    def keys(self) -> list[str]:
        """The requests that HELM's cache has answers to, now."""
        path = self.folder / "prod_env/cache/flexgen.sqlite"
        if not path.exists():
            return []
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            try:
                return sorted(key for (key,) in connection.execute("SELECT key FROM unnamed"))
            except sqlite3.OperationalError:  # it is being made, or written to
                return []
